"""A drawn person as a video file, as someone might have recorded it: what `vnaw infer` is shown on."""

from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import numpy as np

from vnaw_pipeline.crops.source import decode_crop
from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.provenance import atomic_path

WIDTH, HEIGHT, FACE_PX, FRAMES_PER_SECOND = 640, 360, 240, 25
_WALL = (96, 104, 112)


def write_clip(crops: Sequence[Path], path: Path) -> None:
    """Encode drawn crops as an MP4, the face in the middle of a plain wall; a frame whose crop is missing shows the
    wall alone."""
    with atomic_path(path) as partial, av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for crop in crops:
            picture = av.VideoFrame.from_ndarray(scene(crop), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def scene(crop: Path) -> Rgb:
    """One frame of the clip, (360, 640, 3)."""
    rgb = np.full((HEIGHT, WIDTH, 3), _WALL, np.uint8)
    if crop.is_file():
        face = cv2.resize(decode_crop(crop.read_bytes()), (FACE_PX, FACE_PX), interpolation=cv2.INTER_CUBIC)
        top, left = (HEIGHT - FACE_PX) // 2, (WIDTH - FACE_PX) // 2
        rgb[top : top + FACE_PX, left : left + FACE_PX] = face
    return rgb
