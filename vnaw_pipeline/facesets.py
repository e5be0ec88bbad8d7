"""Static expression data: FERPlus, RAF-DB and AffectNet as their owners ship them, mapped into the eight expressions.

What people said of a face is kept as votes, so that a single label, a majority and a distribution all come from one
table. Contempt goes to Other; 'unknown' and 'no face' (NF) are kept beside the eight, to be left out.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.provenance import digest_bytes
from vnaw_pipeline.tasks import EXPRESSIONS, IGNORE_LABEL

Split = Literal["train", "validation", "test"]
LabelSource = Literal["single", "majority", "votes"]
_FERPLUS_COLUMNS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
_FERPLUS_CLASSES = ("Neutral", "Happiness", "Surprise", "Sadness", "Anger", "Disgust", "Fear", "Other")
_FER2013_CLASSES = ("Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Neutral")


@dataclass(frozen=True, kw_only=True)
class FaceSet:
    """N faces and what was said of them.

    `votes` float32 (N, 10): voters per expression in the order of `EXPRESSIONS`, then 'unknown' and 'no face'.
    `single` int64 (N,): the one label that the set ships beside or instead of votes, IGNORE_LABEL where there is none.
    `image(index)` reads one face, uint8 (H, W, 3).
    """

    names: Sequence[str]
    votes: npt.NDArray[np.float32]
    single: npt.NDArray[np.int64]
    image: Callable[[int], Rgb]

    def __len__(self) -> int:
        return len(self.names)

    def majority(self) -> npt.NDArray[np.int64]:
        """The expression most voters chose, (N,); IGNORE_LABEL where it is a tie, unknown or no face."""
        most = self.votes.max(axis=1)
        tied = (self.votes == most[:, None]).sum(axis=1) > 1
        chosen = self.votes.argmax(axis=1)
        return np.where(tied | (chosen >= len(EXPRESSIONS)) | (most == 0), IGNORE_LABEL, chosen).astype(np.int64)

    def targets(self, source: LabelSource) -> npt.NDArray[np.float32]:
        """What to learn, as a distribution over the expressions, (N, 8); rows of zeros are not used.

        `votes` is the distribution of the votes for an expression, of the faces that have a majority; `majority` and
        `single` put all on one.
        """
        labels = self.single if source == "single" else self.majority()
        used = labels != IGNORE_LABEL
        if source == "votes":
            expressions = self.votes[:, : len(EXPRESSIONS)]
            shares = expressions / expressions.sum(axis=1, keepdims=True).clip(min=1)
            chosen = shares
        else:
            chosen = np.eye(len(EXPRESSIONS))[labels]
        return np.asarray(chosen * used[:, None], dtype=np.float32)

    def digest(self) -> str:
        """What tells this set of faces and labels from another."""
        return digest_bytes("\n".join(self.names).encode(), self.votes.tobytes(), self.single.tobytes())


def join_faces(sets: Sequence[FaceSet]) -> FaceSet:
    """Several sets as one, in order."""
    first = np.cumsum([0, *map(len, sets)])

    def image(index: int) -> Rgb:
        which = int(np.searchsorted(first, index, side="right")) - 1
        return sets[which].image(index - int(first[which]))

    return FaceSet(
        names=[name for faces in sets for name in faces.names],
        votes=np.concatenate([faces.votes for faces in sets]),
        single=np.concatenate([faces.single for faces in sets]),
        image=image,
    )


def read_faces(path: Path, split: Split) -> FaceSet:
    """Open a set of static faces; which one it is follows from what lies there.

    `<name>.npz`: arrays `image` uint8 (N, H, W), `name` (N,), `votes` (N, 10) in FERPlus's order, `fer2013_label` (N,)
    in FER2013's codes, -1 for none; it has no splits, so all of it is taken.

    Raises:
        DataError: nothing that is known, or every problem of the set at once.
    """
    if path.suffix == ".npz":
        return _read_npz(path)
    raise DataError(f"{path} is no set of faces that is known: a FERPlus .npz file.")


def _read_npz(path: Path) -> FaceSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable .npz file: {error}.") from error
    if missing := [key for key in ("image", "name", "votes", "fer2013_label") if key not in found]:
        raise DataError(f"{path} has no array '{missing[0]}'; expected image, name, votes and fer2013_label.")
    images, votes = found["image"], found["votes"]
    if images.ndim != 3 or images.dtype != np.uint8 or votes.shape != (len(images), 10):
        raise DataError(
            f"{path}: image is {images.dtype} {images.shape} and votes {votes.shape}; "
            "expected uint8 (N, H, W) and (N, 10)."
        )
    return FaceSet(
        names=[str(name) for name in found["name"]],
        votes=ferplus_votes(votes),
        single=np.append(_codes(_FER2013_CLASSES), IGNORE_LABEL)[found["fer2013_label"].astype(np.int64)],
        image=lambda index: np.repeat(images[index, :, :, None], 3, axis=2),
    )


def ferplus_votes(votes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """FERPlus's ten columns (N, 10) in the order of `EXPRESSIONS`; unknown and NF stay last."""
    ordered = np.zeros(votes.shape, np.float32)
    ordered[:, [*_codes(_FERPLUS_CLASSES), 8, 9]] = votes
    return ordered


def _codes(classes: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.array([EXPRESSIONS.index(name) for name in classes], dtype=np.int64)
