"""Opening a set of faces, whichever it is; and FERPlus as one .npz file."""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.errors import DataError
from vnaw_pipeline.facesets.affectnet import (
    has_affectnet_arrays,
    has_affectnet_tables,
    read_affectnet_arrays,
    read_affectnet_table,
    read_affectnet_tables,
)
from vnaw_pipeline.facesets.faces import VOTE_COLUMNS, FaceSet
from vnaw_pipeline.facesets.ferplus import (
    FER2013_CODES,
    LABELS_NAME,
    VOTES_NAME,
    ferplus_votes,
    grey_to_rgb,
    is_ferplus,
    read_ferplus,
)
from vnaw_pipeline.facesets.rafdb import find_rafdb, read_rafdb
from vnaw_pipeline.facesets.tables import Problems
from vnaw_pipeline.tasks import IGNORE_LABEL, Split


class _Layout(NamedTuple):
    """A set that is a folder: what it is called, what makes it known, and its reader."""

    name: str
    sign: str
    is_at: Callable[[Path], object]
    read: Callable[[Path, Split], FaceSet]


_LAYOUTS = (
    _Layout("FERPlus", f"{VOTES_NAME} or {LABELS_NAME}", is_ferplus, read_ferplus),
    _Layout("RAF-DB", "list_patition_label.txt, also in EmoLabel or basic", find_rafdb, read_rafdb),
    _Layout("AffectNet", "training.csv or validation.csv", has_affectnet_tables, read_affectnet_tables),
    _Layout("AffectNet", "annotations, also in train_set or val_set", has_affectnet_arrays, read_affectnet_arrays),
)


def read_faces(path: Path, split: Split) -> FaceSet:
    """Open a set of static faces; which one it is follows from what lies there.

    A folder is FERPlus, RAF-DB or AffectNet. A file is one of FERPlus's tables (with what lies beside it), a table of
    AffectNet, or an .npz file with arrays `image` uint8 (N, H, W), `name` (N,), `votes` (N, 10) in FERPlus's order and
    `fer2013_label` (N,) in FER2013's codes, -1 for none. A set that has no splits is taken whole for any of them.

    Images are read when they are asked for; that all of the split's are there is checked now.

    Raises:
        DataError: nothing that is known, or the problems of the set (the first 20, and how many more there are).
    """
    if path.is_dir():
        found = [layout for layout in _LAYOUTS if layout.is_at(path)]
        if len(found) == 1:
            return found[0].read(path, split)
        if found:
            raise DataError(f"{path} holds {len(found)} sets of faces; name one of them. There are:{_signs(found)}")
    elif path.suffix == ".npz":
        return _read_npz(path)
    elif path.name in (VOTES_NAME, LABELS_NAME) and path.is_file():
        return read_ferplus(path.parent, split)
    elif path.suffix == ".csv":
        return read_affectnet_table(path)
    seen = "holds no set of faces" if path.is_dir() else "is no set of faces" if path.exists() else "does not exist"
    raise DataError(
        f"{path} {seen} that is known. Expected FERPlus as an .npz file, a table of AffectNet as a .csv file, or a "
        f"folder that is known by one of:{_signs(_LAYOUTS)}"
    )


def _signs(layouts: Sequence[_Layout]) -> str:
    return "".join(f"\n  {layout.name}: {layout.sign}" for layout in layouts)


def _read_npz(path: Path) -> FaceSet:
    arrays = _load_arrays(path)
    if missing := [key for key in ("image", "name", "votes", "fer2013_label") if key not in arrays]:
        raise DataError(f"{path} has no array '{missing[0]}'; expected image, name, votes and fer2013_label.")
    images, names, votes, labels = (arrays[key] for key in ("image", "name", "votes", "fer2013_label"))
    problems = Problems()
    if images.ndim != 3 or images.dtype != np.uint8 or images.size == 0:
        problems.add(path, None, f"image is {images.dtype} {images.shape}; expected uint8 (N, H, W), not empty")
    for key, array, shape, kinds in (
        ("name", names, (len(images),), "U"),
        ("votes", votes, (len(images), VOTE_COLUMNS), "iuf"),
        ("fer2013_label", labels, (len(images),), "iu"),
    ):
        if array.shape != shape or array.dtype.kind not in kinds:
            expected = f"{'text' if kinds == 'U' else 'numbers'} {shape}"
            problems.add(path, None, f"{key} is {array.dtype} {array.shape}; expected {expected}")
    problems.raise_any()
    for index in np.flatnonzero((labels < IGNORE_LABEL) | (labels >= len(FER2013_CODES))):
        expected = f"expected 0 to {len(FER2013_CODES) - 1}, or {IGNORE_LABEL} for none"
        problems.add(path, None, f"face {index} ({names[index]}): fer2013_label is {labels[index]}; {expected}")
    for index in np.flatnonzero(~((votes >= 0) & np.isfinite(votes)).all(axis=1)):
        problems.add(
            path, None, f"face {index} ({names[index]}): votes are {votes[index].tolist()}; expected 0 or more"
        )
    first = dict(zip(names[::-1].tolist(), range(len(names) - 1, -1, -1), strict=True))
    for place, name in enumerate(names.tolist()):
        if first[name] != place:
            problems.add(path, None, f"face {place} has the name of face {first[name]}, {name!r}")
    problems.raise_any()
    return FaceSet(
        names=names.tolist(),
        votes=ferplus_votes(votes),
        single=np.append(FER2013_CODES, IGNORE_LABEL)[labels.astype(np.int64)],
        image=lambda index: grey_to_rgb(images[index]),
    )


def _load_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with path.open("rb") as handle:
            file = np.load(handle, allow_pickle=False)
            return {} if isinstance(file, np.ndarray) else {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable .npz file: {str(error).partition('. ')[0]}.") from error
