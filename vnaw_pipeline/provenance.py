"""What made an artefact: digests, run records, and file writes that are whole or not there."""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vnaw_pipeline.locations import Location, S3Path

_RECORDED_PACKAGES = (
    *("vnaw-pipeline", "torch", "timm", "openvino", "accelerate", "zarr", "numpy"),
    *("opencv-python", "simplejpeg"),
)


@contextmanager
def atomic_path(path: Location) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it onto `path` if the block ends well, delete it otherwise.

    The suffix is kept, since writers such as matplotlib choose the format by it. What goes to S3 lies in the system's
    folder for temporary files until it is uploaded.
    """
    if isinstance(path, S3Path):
        with tempfile.TemporaryDirectory() as folder:
            partial = Path(folder) / path.key.rpartition("/")[2]
            yield partial
            path.upload(partial)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".partial{path.suffix}", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    except OSError as error:
        if error.filename is None:  # of some errors it cannot be set
            error.filename = str(path)  # a full disk does not say which
        raise
    finally:
        partial.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a file is what a kill left of a write, by `atomic_path` or by zarr, which ends the name with .partial."""
    last = name.rpartition("/")[2]
    return last.endswith(".partial") or fnmatchcase(last, ".*.partial.*")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: Location, content: bytes) -> None:
    """Write a file whole: a reader or a kill sees the old content or the new, never a part."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def write_text(path: Location, content: str) -> None:
    """`write_bytes` in UTF-8 with plain newlines on every system."""
    write_bytes(path, content.encode())


def write_json(path: Location, content: Any) -> None:
    """Write JSON, indented, with a final newline."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def digest_bytes(*parts: bytes | memoryview) -> str:
    """First 16 hex digits of the SHA-256 over all parts."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:16]


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the keys in which two fingerprints differ, as 'key: found A, wanted B'."""
    return [
        f"{key}: found {_in_short(found.get(key))}, wanted {_in_short(wanted.get(key))}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]


def _in_short(value: object, length: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one table of dotted keys."""
    table: dict[str, Any] = {}
    for key, value in values.items():
        table |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return table


def code_digest() -> str:
    """Of every module of this package: two copies may differ and yet have the same version."""
    modules = sorted(Path(__file__).parent.rglob("*.py"))
    return digest_bytes(*(module.read_bytes() for module in modules))


def environment() -> dict[str, str]:
    """Versions and machine, for `record.json`: what may change numbers without changing a config."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        **{name: _version(name) for name in _RECORDED_PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def utc_now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
