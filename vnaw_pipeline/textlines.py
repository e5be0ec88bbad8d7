"""Text files as people save them: a byte order mark, CRLF, bytes that are not UTF-8; a problem names its line."""

from pathlib import Path
from typing import NamedTuple


class LineProblem(NamedTuple):
    """What is wrong in a text file, and in which line, counted from 1 (None: the file as a whole)."""

    line: int | None
    message: str


def read_lines(path: Path) -> tuple[list[str], list[LineProblem]]:
    """The lines without trailing blank ones; bytes that are not UTF-8 are replaced and reported.

    A file that cannot be read or holds nothing gives no lines and a problem.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        return [], [LineProblem(None, f"cannot be read: {error.strerror}")]
    content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").rstrip()
    if not content:
        return [], [LineProblem(None, "the file is empty")]
    try:
        return content.decode().split("\n"), []
    except UnicodeDecodeError:
        return content.decode(errors="replace").split("\n"), _undecodable_lines(content)


def located(path: Path, problem: LineProblem) -> str:
    """The problem as `path:line: message`, the form editors and terminals can jump to."""
    place = str(path) if problem.line is None else f"{path}:{problem.line}"
    return f"{place}: {problem.message}"


def shortened(text: str, limit: int = 60) -> str:
    """A piece of a file in quotes, for a message."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


def _undecodable_lines(content: bytes) -> list[LineProblem]:
    problems = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            seen = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
            problems.append(LineProblem(number, f"{seen} is not UTF-8 text; save the file as UTF-8"))
    return problems
