"""Where files lie: a path on this machine, or a key in an S3 bucket.

Both are written whole or not at all, joined with `/`, read, removed and listed. Credentials, region and endpoint of S3
are those of the usual AWS_... variables. What a server cannot do for a while is tried again; what it cannot do at all
is one line that names the place.
"""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from vnaw_pipeline.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from obstore.store import S3Store

Result = TypeVar("Result")

RETRY_SECONDS = 180
"""A request that fails is tried again for so long. Below five minutes, for which a signed request is good."""
REQUEST_SECONDS = 60
"""A reply that takes longer has failed. A chunk has 8 MB at a width of 1024."""
_NOTICE_SECONDS = 10
"""What S3 has not done by then is said to take its time."""
_saying = threading.Lock()
_said: set[str] = set()
_ENDPOINTS = {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"}
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
_NO_CREDENTIALS = (
    "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (files in ~/.aws are not read: "
    "`aws configure export-credentials --format env` prints what they hold)."
)


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
        return reach(self, lambda: bytes(_client(self.bucket).get(self.key).bytes()))

    def upload(self, file: Path) -> None:
        """Make the object from a local file, in parts if it is large; it is there when all of it is."""
        reach(self, lambda: _client(self.bucket).put(self.key, file))

    def unlink(self, missing_ok: bool = True) -> None:
        """Remove the object. S3 does not say whether it was there."""
        reach(self, lambda: _client(self.bucket).delete(self.key))

    def client(self) -> "S3Store":
        """A client whose keys begin at this path."""
        return _client(self.bucket, self.key)


Location = Path | S3Path


def location(where: str | Location) -> Location:
    """The place that a user names: `s3://bucket/key`, or a path.

    Raises:
        ConfigError: another scheme, no bucket, control characters, or `.` or `..` on S3, where no folder is above
            another.
    """
    if isinstance(where, S3Path):
        return where
    scheme, _, rest = str(where).partition(":/")  # of "s3://bucket" a Path leaves "s3:/bucket"
    if not re.fullmatch("[a-zA-Z][a-zA-Z0-9+]+", scheme) or str(where) == scheme:
        return Path(where)
    bucket, *folders = [part for part in rest.split("/") if part] or [""]
    if scheme.lower() != "s3" or not bucket:
        raise ConfigError(f"{where} cannot be used: expected a path, or s3://bucket/folder.")
    if any(ord(character) < ord(" ") for character in rest):
        raise ConfigError(f"{str(where)!r} cannot be used: it has control characters.")
    if {".", ".."} & {bucket, *folders}:
        raise ConfigError(f"{where} cannot be used: '.' and '..' name no folder on S3. Write the whole name.")
    return S3Path(bucket, "/".join(folders))


def files_below(folder: Location) -> dict[str, int]:
    """Every file below a folder, by its name from there, and its size in bytes; of a folder that is not there, none."""
    if isinstance(folder, S3Path):
        listed = reach(folder, lambda: _client(folder.bucket).list(folder.key or None).collect())
        # A folder made in a console is an object `folder/`, which the client lists as `folder`.
        inside = [found for found in listed if found["path"] != folder.key]
        return {found["path"].removeprefix(f"{folder.key}/"): found["size"] for found in inside}
    return dict(_files_below(folder, "")) if folder.exists() else {}


def _files_below(folder: str | os.PathLike[str], prefix: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files_below(entry, f"{prefix}{entry.name}/")
            else:
                with suppress(FileNotFoundError):  # a file that another process was writing has its own name by now
                    yield f"{prefix}{entry.name}", entry.stat().st_size


def reach(place: Location, act: Callable[[], Result]) -> Result:
    """Do something with a place that can be done twice; what goes wrong with it names the place.

    The client of S3 asks again by itself, but not where a reply breaks off. So it is done again for a while.

    Raises:
        StoreError: S3 cannot be reached or used, with what to do. OSError: as it was, with a file name.
    """
    if isinstance(place, Path):
        return _reach(place, act)
    notice = threading.Timer(_NOTICE_SECONDS, _say_slow, [place.bucket])
    notice.daemon = True
    notice.start()
    try:
        return _reach(place, act)
    finally:
        notice.cancel()


def _say_slow(bucket: str) -> None:
    with _saying:  # once, of the threads that wait at a time too
        if bucket in _said:
            return
        _said.add(bucket)
    server = next((f" at {os.environ[name]}" for name in sorted(_ENDPOINTS) if name in os.environ), "")
    sys.stderr.write(
        f"s3://{bucket}{server}: something takes more than {_NOTICE_SECONDS} s. What fails there is tried again, for "
        f"{RETRY_SECONDS // 60} minutes or more.\n"
    )


def _reach(place: Location, act: Callable[[], Result]) -> Result:
    wait, end = 0.1, time.monotonic() + RETRY_SECONDS
    while True:
        try:
            return act()
        except Exception as error:
            text = str(error).partition("\n\nDebug source")[0]
            is_of_client = type(error).__module__.startswith("obstore") or "NoSuchBucket" in text
            if isinstance(place, Path) or not is_of_client:
                if isinstance(error, OSError):
                    error.filename = error.filename or str(place)  # a full disk does not say which
                raise
            if (reason := _lasting_reason(text)) is None and time.monotonic() + wait < end:
                time.sleep(wait)
                wait = min(2 * wait, 10)
                continue
            again = f"{_one_line(text)} What is written is whole; run the same command again to go on."
            raise StoreError(f"{place}: {reason or again}") from error


def _lasting_reason(text: str) -> str | None:
    """What the client's error means for the user; None if it may pass."""
    if "NoSuchBucket" in text:
        return "there is no such bucket. Check its name and AWS_REGION, or AWS_ENDPOINT_URL if it is not on AWS."
    if re.search("/latest/(api/token|meta-data)", text):  # where a machine on AWS is told the credentials of its role
        return _NO_CREDENTIALS
    if re.match("Generic (Config error|S3 error: (Missing|Failed to read token file))", text):  # it has not asked yet
        return (
            f"{_one_line(text)} Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, which go together, "
            "AWS_SKIP_SIGNATURE (true or false), and AWS_WEB_IDENTITY_TOKEN_FILE."
        )
    if code := re.search(r"40[13] (?:Unauthorized|Forbidden)(?:.*?<Code>(\w+))?", text, re.DOTALL):
        return (
            f"access is denied ({code[1] or code[0]}). Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_SESSION_TOKEN, AWS_REGION, and what they allow in this bucket."
        )
    if re.search(r"status code: (?!408|429)[34]|redirect", text):  # the request is wrong, and will be the next time
        return f"{_one_line(text)} Check AWS_REGION, AWS_ENDPOINT_URL and AWS_SESSION_TOKEN."
    return None


def _one_line(text: str) -> str:
    return f"{' '.join(text.split())[:400]}."


@lru_cache
def _client(bucket: str, prefix: str = "") -> "S3Store":
    """Kept, since a client keeps its connections."""
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise StoreError(
            f"s3://{bucket} needs a package more. Install it with `pip install 'vnaw-pipeline[s3]'`."
        ) from error
    _check_settings()
    if not any(name in os.environ for name in _CREDENTIALS):
        _require_metadata_server(bucket)
    return S3Store(
        bucket,
        prefix=prefix or None,
        client_options={"allow_http": True, "timeout": timedelta(seconds=REQUEST_SECONDS)},  # the endpoint decides
        retry_config={"max_retries": 100, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
    )


def _check_settings() -> None:
    """Refuse an endpoint that the client would crash on. An AWS_... variable that is empty counts as not set; it is
    taken away, since the client reads the environment by itself.

    Raises:
        ConfigError: an endpoint is not the address of a server.
    """
    for name in [name for name, value in os.environ.items() if name.startswith("AWS_") and not value]:
        del os.environ[name]
    for name in _ENDPOINTS & os.environ.keys():
        if not _is_server(os.environ[name]):
            raise ConfigError(
                f"{name}={os.environ[name]!r} is not the address of a server: expected http://host or https://host, "
                "with its port if need be, as in http://host:9000. Set it so, or unset it for Amazon's own."
            )


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        is_host = re.fullmatch(r"[\w.:-]+", parts.hostname or "", re.ASCII) is not None
        return parts.scheme in ("http", "https") and is_host and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:  # of a port that is no number, or of brackets
        return False


def _require_metadata_server(bucket: str) -> None:
    """Without credentials in the environment only a machine on AWS has some; elsewhere the client would ask in vain
    for as long as it asks a server."""
    server = urlsplit(os.environ.get("AWS_METADATA_ENDPOINT", "http://169.254.169.254"))
    try:
        socket.create_connection((server.hostname or "", server.port or 80), timeout=2).close()
    except OSError as error:
        raise StoreError(f"s3://{bucket}: {_NO_CREDENTIALS}") from error
