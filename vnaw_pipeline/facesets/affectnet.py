"""AffectNet (Mollahosseini et al. 2017): one label a face, as a table or as one small array a face.

The codes 8, 9 and 10 say that a picture shows none of the expressions, an uncertain one or no face; such pictures are
left out. A test part was never published, so the validation part is both the validation and the test split here.
The pictures of a table show more than the face, whose box the table has.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.facesets.faces import FaceSet, codes_of, one_vote
from vnaw_pipeline.facesets.images import FolderListings, read_image
from vnaw_pipeline.facesets.tables import Names, Problems, Table, split_fields, table_of, whole_number
from vnaw_pipeline.tasks import Split
from vnaw_pipeline.textlines import shortened

_CODES = codes_of("Neutral", "Happiness", "Sadness", "Surprise", "Fear", "Disgust", "Anger", "Other")
_HIGHEST = 10
_EXPECTED = f"expected 0 to {len(_CODES) - 1}, or up to {_HIGHEST} for a picture that is not used"

_BOX_COLUMNS = ("face_x", "face_y", "face_width", "face_height")
_OFFICIAL_COLUMNS = (
    *("subDirectory_filePath", *_BOX_COLUMNS),
    *("facial_landmarks", "expression", "valence", "arousal"),
)
_IMAGE_COLUMNS = ("subDirectory_filePath", "path", "image")
_CODE_COLUMNS = ("expression", "label")
_TABLES: dict[Split, str] = {"train": "training.csv", "validation": "validation.csv", "test": "validation.csv"}
_SETS: dict[Split, str] = {"train": "train_set", "validation": "val_set", "test": "val_set"}
_TABLE_FOLDER, _IMAGE_FOLDER = "Manually_Annotated_file_lists", "Manually_Annotated_Images"
_SUFFIX = "_exp.npy"


class _Box(NamedTuple):
    """Where the face is in its picture, in pixels; it may reach a little beyond."""

    x: float
    y: float
    width: float
    height: float


class _Columns(NamedTuple):
    """Which columns of a table hold the image's path, the code and the four numbers of the box (none: no box)."""

    image: int
    code: int
    box: list[int]


def has_affectnet_tables(root: Path) -> bool:
    """Whether a folder holds a table of AffectNet, of whichever split."""
    return any((root / part / name).is_file() for part in ("", _TABLE_FOLDER) for name in _TABLES.values())


def has_affectnet_arrays(root: Path) -> bool:
    """Whether a folder holds AffectNet as arrays, of whichever split."""
    return any((root / part / "annotations").is_dir() for part in ("", *_SETS.values()))


def read_affectnet_tables(root: Path, split: Split) -> FaceSet:
    """The table of a split below a folder."""
    places = [root / part / _TABLES[split] for part in ("", _TABLE_FOLDER)]
    return read_affectnet_table(next((place for place in places if place.is_file()), places[0]))


def read_affectnet_table(path: Path) -> FaceSet:
    """All of one table: a column with the image's path, one with the code of the expression.

    Where the table has the columns face_x, face_y, face_width and face_height, and a row all four numbers, the last two
    above 0, the face is this part of its picture, else the whole of it.

    Paths start at the table's folder, or at a folder `Manually_Annotated_Images` there or one level up.

    Raises:
        DataError: problems of the table, images that are missing, as `Problems` lists them.
    """
    problems, listings = Problems(), FolderListings()
    table, columns = _open_table(path, problems)
    roots = (path.parent, path.parent / _IMAGE_FOLDER, path.parent.parent / _IMAGE_FOLDER)
    seen = Names(path, problems)
    names, places, labels, boxes = [], [], [], []
    for line, fields in table.rows:
        name, code = fields[columns.image], whole_number(fields[columns.code], _HIGHEST)
        if not name:
            problems.add(path, line, "the image's path is empty")
        else:
            seen.add(name, line)
        if code is None:
            problems.add(path, line, f"the expression is {shortened(fields[columns.code])}; {_EXPECTED}")
        if not name or code is None or code >= len(_CODES):
            continue
        box = _to_box(path, line, [fields[column] for column in columns.box], problems)
        place = next((root for root in roots if listings.has(root / name)), None)
        if place is None:
            problems.add(path, line, f"there is no image {path.parent / name}, nor in {_IMAGE_FOLDER}")
            continue
        names.append(name)
        places.append(place)
        labels.append(code)
        boxes.append(box)
    problems.raise_any()
    return _faces_of(path, names, places, labels, boxes)


def read_affectnet_arrays(root: Path, split: Split) -> FaceSet:
    """`annotations/<id>_exp.npy` and `images/<id>.jpg`; without `train_set` and `val_set` all of it is taken.

    Raises:
        DataError: arrays that are not one code, images that are missing, as `Problems` lists them.
    """
    folder = root if (root / "annotations").is_dir() else root / _SETS[split]
    problems, listings = Problems(), FolderListings()
    annotations = folder / "annotations"
    names, labels = [], []
    for file_name in sorted(listings.names(annotations)):
        if not file_name.endswith(_SUFFIX) or file_name.startswith("."):
            continue
        name = f"{file_name.removesuffix(_SUFFIX)}.jpg"
        path = annotations / file_name
        try:
            code = _read_code(path)
        except DataError as error:
            problems.add(path, None, str(error))
            continue
        if code >= len(_CODES):
            continue
        if not listings.has(folder / "images" / name):
            problems.add(path, None, f"there is no image {folder / 'images' / name}")
        names.append(name)
        labels.append(code)
    problems.raise_any()
    return _faces_of(annotations, names, [folder / "images"] * len(names), labels, [None] * len(names))


def _faces_of(
    path: Path, names: Sequence[str], folders: Sequence[Path], labels: Sequence[int], boxes: Sequence[_Box | None]
) -> FaceSet:
    if not names:
        raise DataError(f"{path}: no face has an expression; {_EXPECTED}.")
    single = _CODES[np.array(labels)]

    def image(index: int) -> Rgb:
        place, box = folders[index] / names[index], boxes[index]
        return read_image(place) if box is None else _cut_out(read_image(place), box, place)

    return FaceSet(names=names, votes=one_vote(single), single=single, image=image)


def _cut_out(rgb: Rgb, box: _Box, path: Path) -> Rgb:
    """What of the box lies in the picture. Where that is less than half of the box, the box is not of this picture."""
    height, width = rgb.shape[:2]
    left, right = (min(max(round(edge), 0), width) for edge in (box.x, box.x + box.width))
    top, bottom = (min(max(round(edge), 0), height) for edge in (box.y, box.y + box.height))
    if (area := (right - left) * (bottom - top)) == 0 or area < box.width * box.height / 2:
        raise DataError(
            f"{path}: the table's box of the face (x, y, width, height), {tuple(box)}, lies mostly outside of the "
            f"picture of {width} x {height}. If the pictures are cut out already, take {', '.join(_BOX_COLUMNS)} out "
            "of the table."
        )
    return rgb[top:bottom, left:right]


def _to_box(path: Path, line: int, texts: Sequence[str], problems: Problems) -> _Box | None:
    """The box in a row's four fields; None where one is empty or NULL, or where width or height are not above 0."""
    if not texts or any(text in ("", "NULL") for text in texts):
        return None
    numbers = []
    for name, text in zip(_BOX_COLUMNS, texts, strict=True):
        try:
            numbers.append(float(text))
        except ValueError:
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            problems.add(path, line, f"{name} is {shortened(text)}; expected a number of pixels, or nothing")
    box = _Box(*numbers)
    return box if box.width > 0 and box.height > 0 else None


def _open_table(path: Path, problems: Problems) -> tuple[Table, _Columns]:
    """The rows, and which column holds what. The official validation.csv has no header."""
    nothing = Table.empty(path), _Columns(0, 0, [])
    lines = problems.read_lines(path)
    if not lines:
        return nothing
    header = split_fields(lines[0])
    official = _Columns(0, _OFFICIAL_COLUMNS.index("expression"), [1, 2, 3, 4])
    if len(header) == len(_OFFICIAL_COLUMNS) and header[official.code].isdigit():
        return table_of(path, lines, 0, problems), official
    found = []
    for names, what in ((_IMAGE_COLUMNS, "image's path"), (_CODE_COLUMNS, "expression")):
        columns = [column for column, name in enumerate(header) if name in names]
        found += columns[:1]
        if len(columns) != 1:
            seen = f"{len(columns)} columns for the {what} in the header {shortened(lines[0])}"
            problems.add(path, 1, f"{seen}; expected one, called {' or '.join(names)}")
    if len(found) != 2:
        return nothing
    box = [header.index(name) for name in _BOX_COLUMNS] if set(_BOX_COLUMNS) <= set(header) else []
    return table_of(path, lines, 1, problems), _Columns(found[0], found[1], box)


def _read_code(path: Path) -> int:
    """The code in one array: a number, or text as the owners saved it."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"is not a readable .npy file: {str(error).partition('. ')[0]}") from error
    if not isinstance(array, np.ndarray):
        raise DataError("is an .npz file under another name; expected one array")
    if array.size != 1 or array.dtype.kind not in "iufU":
        raise DataError(f"holds {array.dtype} {array.shape}; expected one code")
    value = array.reshape(-1)[0].item()
    code = whole_number(f"{value:g}" if isinstance(value, float) else str(value).strip(), _HIGHEST)
    if code is None:
        raise DataError(f"the expression is {value!r}; {_EXPECTED}")
    return code
