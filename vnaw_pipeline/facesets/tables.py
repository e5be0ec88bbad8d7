"""The tables that come with faces, row by row, and the collection of what is wrong in them."""

import csv
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from vnaw_pipeline.errors import DataError, listing
from vnaw_pipeline.textlines import LineProblem, located, read_lines, shortened


class Problems:
    """What is wrong in the files of one set: collected, then raised as one error, by file and line. It shows the first
    20, and how many more there are."""

    def __init__(self) -> None:
        self._found: dict[Path, list[LineProblem]] = {}
        self._undecodable: set[tuple[Path, int]] = set()

    def add(self, path: Path, line: int | None, message: str) -> None:
        """Note a problem; `line` is None for the file as a whole. That a line is not UTF-8 is said of it alone."""
        if line is None or (path, line) not in self._undecodable:
            self._found.setdefault(path, []).append(LineProblem(line, message))

    def read_lines(self, path: Path) -> list[str]:
        """The lines of a text file; those that are not UTF-8 keep their place and are problems."""
        lines, found = read_lines(path)
        for problem in found:
            self.add(path, *problem)
        self._undecodable.update((path, problem.line) for problem in found if problem.line is not None)
        return lines

    def raise_any(self) -> None:
        """
        Raises:
            DataError: there are problems; names the first 20.
        """
        if self._found:
            ordered = [
                located(path, problem)
                for path, problems in self._found.items()
                for problem in sorted(problems, key=lambda problem: problem.line or 0)
            ]
            raise DataError(listing(ordered))


class Row(NamedTuple):
    """A row and its line in the file."""

    line: int
    fields: list[str]


class Table(NamedTuple):
    """The rows that have the right number of columns, of `num_rows` in the file."""

    path: Path
    rows: list[Row]
    num_rows: int

    @classmethod
    def empty(cls, path: Path) -> Self:
        return cls(path, [], 0)


def read_table(path: Path, problems: Problems, header: Sequence[str]) -> Table:
    """A comma-separated file whose first line must be `header`."""
    lines = problems.read_lines(path)
    if not lines:
        return Table.empty(path)
    if split_fields(lines[0]) != list(header):
        problems.add(path, 1, f"the header is {shortened(lines[0])}; expected {','.join(header)!r}")
        return Table.empty(path)
    return table_of(path, lines, 1, problems)


def table_of(path: Path, lines: list[str], skipped: int, problems: Problems) -> Table:
    """Split lines into as many fields as the first has, leaving some out at the top; fewer or more are problems."""
    columns = len(split_fields(lines[0]))
    if len(lines) == skipped:
        problems.add(path, None, "there is no row")
    rows = []
    for number, line in enumerate(lines[skipped:], start=skipped + 1):
        fields = split_fields(line)
        if len(fields) == columns:
            rows.append(Row(number, fields))
        else:
            problems.add(path, number, f"{len(fields)} columns in {shortened(line)}; expected {columns}")
    return Table(path, rows, len(lines) - skipped)


def split_fields(line: str) -> list[str]:
    """The fields of one line of a CSV file, without spaces around them; a field may be quoted."""
    fields = line.split(",")
    if '"' in line:
        with suppress(csv.Error):
            fields = next(csv.reader([line]))
    return [field.strip() for field in fields]


def whole_number(text: str, highest: int) -> int | None:
    """A number from 0 to `highest`, or None."""
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    return int(text) if is_number and int(text) <= highest else None


class Names:
    """The names seen in a table; a second one of a kind is a problem."""

    def __init__(self, path: Path, problems: Problems) -> None:
        self._path = path
        self._problems = problems
        self._first: dict[str, int] = {}

    def add(self, name: str, line: int) -> None:
        first = self._first.setdefault(name, line)
        if first != line:
            self._problems.add(self._path, line, f"{shortened(name)} is in line {first} already; one row an image")
