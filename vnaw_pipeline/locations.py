"""Where files lie: a path on this machine, or a key in an S3 bucket.

Both are written whole or not at all, joined with `/`, read, removed and listed. Credentials, region and endpoint of S3
are those of the usual AWS_... variables. What a server cannot do for a while is tried again; what it cannot do at all
is one line that names the place.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from vnaw_pipeline.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from obstore.store import S3Store

RETRY_SECONDS = 180
"""A request that fails is tried again for so long. Below five minutes, for which a signed request is good."""
REQUEST_SECONDS = 60
"""A reply that takes longer has failed. A chunk has 8 MB at a width of 1024."""


@dataclass(frozen=True)
class S3Path:
    """An object, or what lies under a prefix, as `s3://bucket/key`; the part of `pathlib.Path` that it needs.

    Its methods raise StoreError where the bucket cannot be reached or used.
    """

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> "S3Path":
        return S3Path(self.bucket, f"{self.key}/{name}".lstrip("/"))

    def is_file(self) -> bool:
        """Whether there is an object of this key. It is read, since only a reply with a body names a missing bucket."""
        try:
            self.read_bytes()
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self) -> bytes:
        """The object. Raises FileNotFoundError if there is none."""
        with reached(self):
            return bytes(self.client("").get(self.key).bytes())

    def upload(self, file: Path) -> None:
        """Make the object from a local file, in parts if it is large; it is there when all of it is."""
        with reached(self):
            self.client("").put(self.key, file)

    def unlink(self, missing_ok: bool = True) -> None:
        """Remove the object. S3 does not say whether it was there."""
        with reached(self):
            self.client("").delete(self.key)

    def client(self, prefix: str | None = None) -> "S3Store":
        """A client whose keys begin at this prefix; None: at this path."""
        return _client(self.bucket, self.key if prefix is None else prefix)


Location = Path | S3Path


def location(where: str | Location) -> Location:
    """The place that a user names: `s3://bucket/key`, or a path.

    Raises:
        ConfigError: another scheme, or no bucket.
    """
    if isinstance(where, S3Path):
        return where
    scheme, _, rest = str(where).partition(":/")  # of "s3://bucket" a Path leaves "s3:/bucket"
    if not re.fullmatch("[a-z][a-z0-9+]+", scheme) or str(where) == scheme:
        return Path(where)
    bucket, _, key = rest.strip("/").partition("/")
    if scheme != "s3" or not bucket:
        raise ConfigError(f"{where} cannot be used: expected a path, or s3://bucket/folder.")
    return S3Path(bucket, key)


def files_below(folder: Location) -> Iterator[tuple[str, int]]:
    """Every file below a folder, by its name from there and its size in bytes; of a folder that is not there, none."""
    if isinstance(folder, S3Path):
        with reached(folder):
            for objects in folder.client().list():
                for found in objects:
                    yield found["path"], found["size"]
    elif folder.exists():
        yield from _files_below(folder, "")


def _files_below(folder: str | os.PathLike[str], prefix: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files_below(entry, f"{prefix}{entry.name}/")
            else:
                with suppress(FileNotFoundError):  # a file that another process was writing has its own name by now
                    yield f"{prefix}{entry.name}", entry.stat().st_size


@contextmanager
def reached(place: Location) -> Iterator[None]:
    """Name the place in what goes wrong with it.

    Raises:
        StoreError: S3 cannot be reached or used, with what to do. OSError: as it was, with a file name.
    """
    try:
        yield
    except Exception as error:
        if isinstance(place, S3Path) and (reason := _s3_reason(error)) is not None:
            raise StoreError(f"{place}: {reason}") from error
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            error.filename = str(place)  # a full disk does not say which
        raise


def _s3_reason(error: Exception) -> str | None:
    """What the client's error means for the user; None if it is not about the server or the bucket."""
    text = str(error).partition("\n\nDebug source")[0]
    if "NoSuchBucket" in text:
        return "there is no such bucket. Check its name and AWS_REGION, or AWS_ENDPOINT_URL if it is not on AWS."
    if isinstance(error, OSError) or not type(error).__module__.startswith("obstore"):
        return None
    if "http://169.254." in text:  # where machines on AWS find the credentials of their role
        return (
            "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (files in ~/.aws are not read: "
            "`aws configure export-credentials --format env` prints what they hold)."
        )
    if code := re.search(r"40[13] (?:Unauthorized|Forbidden)(?:.*?<Code>(\w+))?", text, re.DOTALL):
        return (
            f"access is denied ({code[1] or code[0]}). Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_SESSION_TOKEN, AWS_REGION, and what they allow in this bucket."
        )
    return f"{' '.join(text.split())[:400]}. What is written is whole; run the same command again to go on."


@lru_cache
def _client(bucket: str, prefix: str) -> "S3Store":
    """Kept, since a client keeps its connections."""
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise StoreError(
            f"s3://{bucket} needs a package more. Install it with `pip install 'vnaw-pipeline[s3]'`."
        ) from error
    return S3Store(
        bucket,
        prefix=prefix or None,
        client_options={"allow_http": True, "timeout": timedelta(seconds=REQUEST_SECONDS)},  # the endpoint decides
        retry_config={"max_retries": 100, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
    )
