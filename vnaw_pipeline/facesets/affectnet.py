"""AffectNet (Mollahosseini et al. 2017): one label a face, as a table or as one small array a face.

The codes 8, 9 and 10 say that a picture shows none of the expressions, an uncertain one or no face; such pictures are
left out. A test part was never published, so the validation part is both the validation and the test split here.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vnaw_pipeline.errors import DataError
from vnaw_pipeline.facesets.faces import FaceSet, codes_of, one_vote
from vnaw_pipeline.facesets.images import FolderListings, read_image
from vnaw_pipeline.facesets.tables import Names, Problems, Table, split_fields, table_of, whole_number
from vnaw_pipeline.tasks import Split
from vnaw_pipeline.textlines import shortened

_CODES = codes_of("Neutral", "Happiness", "Sadness", "Surprise", "Fear", "Disgust", "Anger", "Other")
_HIGHEST = 10
_EXPECTED = f"expected 0 to {len(_CODES) - 1}, or up to {_HIGHEST} for a picture that is not used"

_OFFICIAL_COLUMNS = (
    *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height"),
    *("facial_landmarks", "expression", "valence", "arousal"),
)
_IMAGE_COLUMNS = ("subDirectory_filePath", "path", "image")
_CODE_COLUMNS = ("expression", "label")
_TABLES: dict[Split, str] = {"train": "training.csv", "validation": "validation.csv", "test": "validation.csv"}
_SETS: dict[Split, str] = {"train": "train_set", "validation": "val_set", "test": "val_set"}
_TABLE_FOLDER, _IMAGE_FOLDER = "Manually_Annotated_file_lists", "Manually_Annotated_Images"
_SUFFIX = "_exp.npy"


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

    Paths start at the table's folder, or at a folder `Manually_Annotated_Images` there or one level up.

    Raises:
        DataError: every problem of the table, every image that is missing.
    """
    problems, listings = Problems(), FolderListings()
    table, image_column, code_column = _open_table(path, problems)
    roots = (path.parent, path.parent / _IMAGE_FOLDER, path.parent.parent / _IMAGE_FOLDER)
    seen = Names(path, problems)
    names, places, labels = [], [], []
    for line, fields in table.rows:
        name, code = fields[image_column], whole_number(fields[code_column], _HIGHEST)
        if not name:
            problems.add(path, line, "the image's path is empty")
        else:
            seen.add(name, line)
        if code is None:
            problems.add(path, line, f"the expression is {shortened(fields[code_column])}; {_EXPECTED}")
        if not name or code is None or code >= len(_CODES):
            continue
        place = next((root for root in roots if listings.has(root / name)), None)
        if place is None:
            problems.add(path, line, f"there is no image {path.parent / name}, nor in {_IMAGE_FOLDER}")
            continue
        names.append(name)
        places.append(place)
        labels.append(code)
    problems.raise_any()
    return _faces_of(path, names, places, labels)


def read_affectnet_arrays(root: Path, split: Split) -> FaceSet:
    """`annotations/<id>_exp.npy` and `images/<id>.jpg`; without `train_set` and `val_set` all of it is taken.

    Raises:
        DataError: every array that is not one code, every image that is missing.
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
    return _faces_of(annotations, names, [folder / "images"] * len(names), labels)


def _faces_of(path: Path, names: Sequence[str], folders: Sequence[Path], labels: Sequence[int]) -> FaceSet:
    if not names:
        raise DataError(f"{path}: no face has an expression; {_EXPECTED}.")
    single = _CODES[np.array(labels)]
    return FaceSet(
        names=names,
        votes=one_vote(single),
        single=single,
        image=lambda index: read_image(folders[index] / names[index]),
    )


def _open_table(path: Path, problems: Problems) -> tuple[Table, int, int]:
    """The rows, and which column holds the path and which the code. The official validation.csv has no header."""
    lines = problems.read_lines(path)
    if not lines:
        return Table.empty(path), 0, 0
    header = split_fields(lines[0])
    official_code = _OFFICIAL_COLUMNS.index("expression")
    if len(header) == len(_OFFICIAL_COLUMNS) and header[official_code].isdigit():
        return table_of(path, lines, 0, problems), 0, official_code
    found = []
    for names, what in ((_IMAGE_COLUMNS, "image's path"), (_CODE_COLUMNS, "expression")):
        columns = [column for column, name in enumerate(header) if name in names]
        found += columns[:1]
        if len(columns) != 1:
            seen = f"{len(columns)} columns for the {what} in the header {shortened(lines[0])}"
            problems.add(path, 1, f"{seen}; expected one, called {' or '.join(names)}")
    if len(found) != 2:
        return Table.empty(path), 0, 0
    return table_of(path, lines, 1, problems), found[0], found[1]


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
