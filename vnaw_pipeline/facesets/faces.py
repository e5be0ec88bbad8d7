"""A set of faces: what people said of each is kept as votes, so that a single label, a majority and a distribution
all come from one table. Contempt goes to Other; 'unknown' and 'no face' (NF) are kept beside the eight, to be left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.provenance import digest_bytes
from vnaw_pipeline.tasks import EXPRESSIONS, IGNORE_LABEL

LabelSource = Literal["single", "majority", "votes"]
VOTE_COLUMNS = len(EXPRESSIONS) + 2
"""The expressions, 'unknown' and 'no face'."""


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
        return np.where(tied | (chosen >= len(EXPRESSIONS)), IGNORE_LABEL, chosen).astype(np.int64)

    def targets(self, source: LabelSource) -> npt.NDArray[np.float32]:
        """What to learn, as a distribution over the expressions, (N, 8); rows of zeros are not used.

        `votes` is the distribution of the votes for an expression, of the faces that have a majority; `majority` and
        `single` put all on one.
        """
        labels = self.single if source == "single" else self.majority()
        used = labels != IGNORE_LABEL
        if source == "votes":
            expressions = self.votes[:, : len(EXPRESSIONS)]
            totals = expressions.sum(axis=1, keepdims=True)  # below 1 for shares of voters, of whom some saw none
            chosen = expressions / np.where(totals > 0, totals, 1)
        else:
            chosen = np.eye(len(EXPRESSIONS))[labels]
        return np.asarray(chosen * used[:, None], dtype=np.float32)

    def digest(self) -> str:
        """Of the names, votes and labels of the faces, in order; not of their pictures."""
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


def codes_of(*classes: str) -> npt.NDArray[np.int64]:
    """Where a set's classes, in the set's order, stand in `EXPRESSIONS`."""
    return np.array([EXPRESSIONS.index(name) for name in classes], dtype=np.int64)


def one_vote(single: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Votes (N, 10) of faces that have one label each, (N,)."""
    return np.eye(VOTE_COLUMNS, dtype=np.float32)[single]
