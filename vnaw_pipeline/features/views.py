"""Views: what is done to the encoder's input before a frame is encoded once more.

`plain` nothing; `mirror` flips it left to right (the mirror image of NLA's consistency); `erase0`, `erase1`, ... erase
pixels (V-NAW Eq. 4, 5: exactly 20% of each frame, the same set for all frames of a clip). A clip is not known yet when
features are extracted, so a video is cut into spans of frames, and a span takes the clip's place. The paper leaves the
shape of the set open: ours is made of blocks, since a lone pixel hides nothing from an encoder.

What makes a view is its *recipe*, plain values kept with the store. `B` frames of a batch, `S` input side in pixels.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

PLAIN, MIRROR = "plain", "mirror"
ERASED_SHARE = 0.2
GRID = 14
"""Blocks along a side of the image; 16 x 16 pixels of 224."""

Recipe = Mapping[str, Any]


def view_recipes(views: Sequence[str], span_frames: int, seed: int) -> dict[str, Recipe]:
    """What makes each of the views."""
    erased = {"erased_share": ERASED_SHARE, "grid": GRID, "span_frames": span_frames, "seed": seed}
    known: dict[str, Recipe] = {PLAIN: {}, MIRROR: {"flip": "left-right"}}
    return {view: known.get(view, erased) for view in views}


def frames_in_view(
    view: str, recipe: Recipe, frames: npt.NDArray[np.uint8], video_id: str, first_frame: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_] | None]:
    """The encoder's input (B, S, S, 3) of consecutive frames in a view, and which pixels of it are erased, bool
    (B, S, S); None: none of them. An erased pixel takes the encoder's mean colour."""
    if view == PLAIN:
        return frames, None
    if view == MIRROR:
        return np.ascontiguousarray(frames[:, :, ::-1]), None
    span_of = (first_frame + np.arange(len(frames))) // recipe["span_frames"]
    spans, mask_of = np.unique(span_of, return_inverse=True)
    masks = np.stack([erased_pixels(recipe, video_id, view, int(span), frames.shape[1]) for span in spans])
    return frames, masks[mask_of]


def erased_pixels(recipe: Recipe, video_id: str, view: str, span: int, side: int) -> npt.NDArray[np.bool_]:
    """The pixels that one span of a video loses, bool (S, S): whole blocks in a drawn order, as many as it takes, the
    last one cut so that it is exactly the share.

    Drawn from the seed and the names alone, so neither processes nor order nor a kill can change it.
    """
    drawn_from = json.dumps([recipe["seed"], video_id, view, span]).encode()
    # RandomState, because NumPy promises that its numbers stay the same in every version.
    generator = np.random.RandomState(np.frombuffer(hashlib.sha256(drawn_from).digest(), dtype="<u4"))
    grid = recipe["grid"]
    order = generator.permutation(grid * grid).reshape(grid, grid)
    block = np.arange(side) * grid // side
    turn = order[block[:, None], block[None, :]]
    erased = np.zeros(side * side, dtype=np.bool_)
    erased[np.argsort(turn, axis=None, kind="stable")[: round(recipe["erased_share"] * side * side)]] = True
    return erased.reshape(side, side)
