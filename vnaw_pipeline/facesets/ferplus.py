"""FERPlus (Barsoum et al. 2016): ten voters for each of the faces of FER2013 (Goodfellow et al. 2013).

Images are numbered without those that FERPlus dropped, so `fer0028638.png` is not row 28638 of the table: what
`fer2013.csv` says of an image is found by the order of the rows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.facesets.faces import VOTE_COLUMNS, FaceSet, codes_of, one_vote
from vnaw_pipeline.facesets.images import FolderListings, read_image
from vnaw_pipeline.facesets.tables import Names, Problems, Table, read_table, whole_number
from vnaw_pipeline.tasks import IGNORE_LABEL, Split
from vnaw_pipeline.textlines import shortened

VOTES_NAME, LABELS_NAME = "fer2013new.csv", "fer2013.csv"
FER2013_CODES = codes_of("Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Neutral")
_VOTED = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF")
_VOTED_CODES = codes_of("Neutral", "Happiness", "Surprise", "Sadness", "Anger", "Disgust", "Fear", "Other")
_MOST_VOTES = 255
_SIDE_PX = 48
_USAGE: dict[Split, str] = {"train": "Training", "validation": "PublicTest", "test": "PrivateTest"}
_FOLDER: dict[Split, str] = {"train": "FER2013Train", "validation": "FER2013Valid", "test": "FER2013Test"}


class _Voted(NamedTuple):
    """A row of fer2013new.csv; the name is empty where FERPlus dropped the image."""

    usage: str
    name: str
    votes: list[int]


class _Labelled(NamedTuple):
    """A row of fer2013.csv; no pixels where they are not asked for."""

    usage: str
    label: int
    pixels: bytes


def ferplus_votes(votes: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """FERPlus's ten columns (N, 10) in the order of `EXPRESSIONS`; unknown and NF stay last."""
    ordered = np.zeros(votes.shape, np.float32)
    ordered[:, [*_VOTED_CODES, VOTE_COLUMNS - 2, VOTE_COLUMNS - 1]] = votes
    return ordered


def is_ferplus(root: Path) -> bool:
    """Whether a folder holds a table of FERPlus or FER2013."""
    return any((root / name).is_file() for name in (VOTES_NAME, LABELS_NAME))


def read_ferplus(root: Path, split: Split) -> FaceSet:
    """Votes from fer2013new.csv, labels from fer2013.csv, images from PNGs if the split's folder is there, else pixels.

    Without fer2013new.csv a label is one vote; without fer2013.csv there is no single label. A face that FERPlus
    dropped has pixels but no PNG.

    Raises:
        DataError: problems of the tables, images of the split that are missing, as `Problems` lists them.
    """
    problems, listings = Problems(), FolderListings()
    votes_path, labels_path = root / VOTES_NAME, root / LABELS_NAME
    has_votes, has_labels = votes_path.is_file(), labels_path.is_file()
    folder = _image_folder(root, split) if has_votes else None
    voted_table = read_table(votes_path, problems, ("Usage", "Image name", *_VOTED)) if has_votes else None
    labels_table = read_table(labels_path, problems, ("emotion", "pixels", "Usage")) if has_labels else None
    voted = _scan_votes(voted_table, problems) if voted_table else {}
    labelled = _scan_labels(labels_table, None if folder else split, problems) if labels_table else {}
    if voted_table and labels_table:
        _compare(voted_table, labels_table, voted, labelled, problems)
    lines = [line for line, row in (voted if has_votes else labelled).items() if row.usage == _USAGE[split]]
    if folder is not None:
        lines = [line for line in lines if voted[line].name]
        for line in lines:
            if not listings.has(folder / voted[line].name):
                problems.add(votes_path, line, f"there is no image {folder / voted[line].name}")
    elif not has_labels:
        problems.add(votes_path, None, f"neither {_FOLDER[split]} nor {LABELS_NAME} with the pixels lies beside it")
    problems.raise_any()
    if not lines:
        raise DataError(f"{root}: no row has an image and Usage '{_USAGE[split]}', so there is no {split} face.")
    single = np.full(len(lines), IGNORE_LABEL, dtype=np.int64)
    if has_labels:
        single = FER2013_CODES[[labelled[line].label for line in lines]]
    names = [voted[line].name if has_votes else "" for line in lines]
    if folder is None:
        pixels = np.frombuffer(b"".join(labelled[line].pixels for line in lines), np.uint8)
        images = pixels.reshape(-1, _SIDE_PX, _SIDE_PX)

    def image(index: int) -> Rgb:
        return read_image(folder / names[index]) if folder is not None else grey_to_rgb(images[index])

    return FaceSet(
        names=[name or f"{LABELS_NAME}:{line}" for name, line in zip(names, lines, strict=True)],
        votes=ferplus_votes(np.array([voted[line].votes for line in lines])) if has_votes else one_vote(single),
        single=single,
        image=image,
    )


def grey_to_rgb(grey: npt.NDArray[np.uint8]) -> Rgb:
    """(H, W) as (H, W, 3)."""
    return np.repeat(grey[:, :, None], 3, axis=2)


def _image_folder(root: Path, split: Split) -> Path | None:
    places = (root / part / _FOLDER[split] for part in ("", "data", "images"))
    return next((place for place in places if place.is_dir()), None)


def _scan_votes(table: Table, problems: Problems) -> dict[int, _Voted]:
    """The good rows by line."""
    found = {}
    seen = Names(table.path, problems)
    for line, (usage, name, *texts) in table.rows:
        votes = [vote for text in texts if (vote := whole_number(text, _MOST_VOTES)) is not None]
        if len(votes) < len(texts):
            bad = ", ".join(shortened(text) for text in texts if whole_number(text, _MOST_VOTES) is None)
            problems.add(table.path, line, f"bad votes {bad}; expected whole numbers from 0 to {_MOST_VOTES}")
        if name:
            seen.add(name, line)
        if _is_usage(table.path, line, usage, problems) and len(votes) == len(texts):
            found[line] = _Voted(usage, name, votes)
    return found


def _scan_labels(table: Table, pixels_of: Split | None, problems: Problems) -> dict[int, _Labelled]:
    """The good rows by line; pixels are kept for one split, and looked at for none if there is none."""
    found = {}
    for line, (text, pixels_text, usage) in table.rows:
        label = whole_number(text, len(FER2013_CODES) - 1)
        if label is None:
            problems.add(table.path, line, f"the emotion is {shortened(text)}; expected 0 to {len(FER2013_CODES) - 1}")
        pixels = _to_pixels(pixels_text) if pixels_of else b""
        if pixels is None:
            expected = f"expected {_SIDE_PX**2} whole numbers from 0 to 255"
            problems.add(table.path, line, f"bad pixels {shortened(pixels_text, 20)}; {expected}")
        if _is_usage(table.path, line, usage, problems) and label is not None and pixels is not None:
            found[line] = _Labelled(usage, label, pixels if pixels_of and usage == _USAGE[pixels_of] else b"")
    return found


def _to_pixels(text: str) -> bytes | None:
    """The pixels of one face; 83 million numbers in the whole file are too many for `int`."""
    digits = text.replace(" ", "")
    if not (digits.isascii() and digits.isdigit()):
        return None
    pixels = np.fromstring(text, np.int64, sep=" ")
    is_face = len(pixels) == _SIDE_PX**2 and pixels.max() <= 255
    return pixels.astype(np.uint8).tobytes() if is_face else None


def _is_usage(path: Path, line: int, usage: str, problems: Problems) -> bool:
    if usage not in _USAGE.values():
        problems.add(path, line, f"the Usage is {shortened(usage)}; expected {', '.join(_USAGE.values())}")
        return False
    return True


def _compare(
    voted_table: Table,
    labels_table: Table,
    voted: Mapping[int, _Voted],
    labelled: Mapping[int, _Labelled],
    problems: Problems,
) -> None:
    """The two tables are joined by the order of their rows; so they must have the same, of the same Usage."""
    path, other = voted_table.path, labels_table.path
    if voted_table.num_rows != labels_table.num_rows and voted_table.num_rows and labels_table.num_rows:
        seen = f"{voted_table.num_rows} rows, but {other} has {labels_table.num_rows}"
        problems.add(path, None, f"{seen}; the two are joined by the order of their rows")
        return
    for line in voted.keys() & labelled.keys():
        if voted[line].usage != labelled[line].usage:
            seen = f"the Usage is {voted[line].usage!r}, but {labelled[line].usage!r} in {other}:{line}"
            problems.add(path, line, f"{seen}; the two are joined by the order of their rows")
