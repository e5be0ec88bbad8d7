"""The feature bank: all frames a run needs, resident, so that a window is a gather and not a read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vnaw_pipeline.features.store import FeatureStore
from vnaw_pipeline.features.views import PLAIN
from vnaw_pipeline.stages import progress_bar


@dataclass(frozen=True)
class FeatureBank:
    """Frames of several videos, end to end, and one row of zeros at the end for positions without a frame.

    `embeddings` float16 (N + 1, D) and `valid` bool (N + 1,) lie on one device; `first` int64 (V + 1,) is the row of
    each video's first frame, `first[V] = N`. `video_ids` names the videos in that order. `other_views` are further
    embeddings (N + 1, D) of the same frames, by view; `embeddings` is the plain one.
    """

    video_ids: list[str]
    embeddings: Tensor
    valid: Tensor
    first: Tensor
    other_views: Mapping[str, Tensor] = field(default_factory=dict)

    def view(self, name: str) -> Tensor:
        """Embeddings (N + 1, D) in a view that the bank was opened with."""
        return self.embeddings if name == PLAIN else self.other_views[name]

    @property
    def num_frames(self) -> Tensor:
        """Frames of each video, int64 (V,)."""
        return self.first[1:] - self.first[:-1]

    @property
    def embedding_dim(self) -> int:
        """Embedding width D."""
        return self.embeddings.shape[1]

    @property
    def zero_row(self) -> int:
        """Row of zeros, never valid."""
        return self.embeddings.shape[0] - 1

    def to(self, device: torch.device) -> "FeatureBank":
        """The bank on another device (itself if it is there)."""
        others = {name: tensor.to(device) for name, tensor in self.other_views.items()}
        return FeatureBank(
            self.video_ids, self.embeddings.to(device), self.valid.to(device), self.first.to(device), others
        )


def open_bank(
    store: FeatureStore, video_ids: list[str] | None = None, shown: bool = True, views: Sequence[str] = (PLAIN,)
) -> FeatureBank:
    """Read whole videos from a store into memory: N frames of width D take 2 N D bytes a view. Plain is always read.

    Raises:
        StoreError: a view or a video is missing or not complete.
    """
    views = (PLAIN, *(view for view in views if view != PLAIN))
    video_ids = store.video_ids() if video_ids is None else video_ids
    store.require(video_ids, views)
    first = np.concatenate([[0], np.cumsum([store.num_frames(video_id) for video_id in video_ids])]).astype(np.int64)
    total = int(first[-1])
    embeddings = {view: np.empty((total + 1, store.embedding_dim), dtype=np.float16) for view in views}
    valid = np.empty(total + 1, dtype=np.bool_)
    valid[total] = False
    with progress_bar("load features", total * len(views), shown=shown) as bar:
        for view, rows in embeddings.items():
            rows[total] = 0
            for video_id, start, stop in zip(video_ids, first[:-1], first[1:], strict=True):
                store.read_into(video_id, rows[start:stop], valid[start:stop], view)
                bar.advance(int(stop - start))
    tensors = {view: torch.from_numpy(rows) for view, rows in embeddings.items()}
    return FeatureBank(video_ids, tensors.pop(PLAIN), torch.from_numpy(valid), torch.from_numpy(first), tensors)
