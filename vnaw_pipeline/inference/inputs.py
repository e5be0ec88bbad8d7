"""What is given: videos, images, folders of them, a camera; each becomes a series of frames."""

import queue
import signal
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

import cv2
import numpy as np

from vnaw_pipeline.crops.video import Frame, Rgb, VideoReader
from vnaw_pipeline.errors import DataError, listing
from vnaw_pipeline.layouts import VIDEO_SUFFIXES

JUMP_S = 1.0
"""Times that step back by more begin anew there; by less, they are inaccurate."""
CAMERA_PATIENCE_S = 10.0
"""A camera that sends nothing for so long is gone."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def is_image(path: Path) -> bool:
    """Whether a file is a still picture, by its name."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def find_inputs(given: Sequence[Path]) -> dict[str, Path]:
    """The files to read, in order, by the name that their results get: the stem, or the whole name where two files
    of the same stem were given (a phone's IMG_1.JPG and IMG_1.MOV). A folder stands for the media directly in it, and
    for itself if there are none.

    Raises:
        DataError: two files of the same name.
    """
    paths: list[Path] = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        found = sorted(
            file
            for file in path.iterdir()
            if file.suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES and file.name[0] != "." and file.is_file()
        )
        paths += found or [path]
    stems = Counter(path.stem for path in paths)
    names = [printable(path.stem if stems[path.stem] == 1 else path.name) for path in paths]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            "Two inputs of one name would share a folder of results; rename one, or give one with another --out:\n"
            + listing([str(path) for name, path in zip(names, paths, strict=True) if name in twice])
        )
    return dict(zip(names, paths, strict=True))


def require_file(path: Path) -> None:
    """Raise DataError for a folder, which is an input only where it holds none."""
    if path.is_dir():
        endings = " ".join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)
        raise DataError(f"There is no video and no image in {path} (looked for {endings}; not in its folders).")


def printable(text: str) -> str:
    """Text that can be written as UTF-8: a file name that is not has a mark for each byte that is none."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def read_image(path: Path) -> Rgb:
    """Read a picture, upright as its EXIF orientation says; (H, W, 3).

    Raises:
        DataError: no such file, one that may not be read, or not a picture.
    """
    try:
        content = np.frombuffer(path.read_bytes(), np.uint8)
    except FileNotFoundError as error:
        raise DataError(f"No such image: {path}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    bgr = None
    with suppress(cv2.error):  # a header that states an impossible size
        bgr = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if bgr is None:
        raise DataError(f"{path} cannot be read as an image. It is empty, damaged, or of another kind.")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def timed(video: VideoReader, from_first: bool = False) -> Iterator[Frame]:
    """A video's frames, each with a time that no later one is before: where the file has none, from the frame rate (25
    if that is missing too).

    Times count from the beginning of the file; `from_first`: from the first frame, as a camera's clock starts anywhere.
    Where they jump back, as in files that were joined, they go on from the frame before.
    """
    fps = video.fps if np.isfinite(video.fps) else 25.0
    latest_s, shift_s = -np.inf, -video.start_s
    for frame in video:
        time_s = frame.time_s if np.isfinite(frame.time_s) else video.start_s + frame.frame_index / fps
        if frame.frame_index == 0 and from_first:
            shift_s = -time_s
        if time_s + shift_s < latest_s - JUMP_S:
            shift_s = latest_s + 1 / fps - time_s
        latest_s = max(latest_s, time_s + shift_s)
        yield frame._replace(time_s=latest_s)


def camera_frames(video: VideoReader) -> Generator[Frame]:
    """The frames of a camera, which is closed at the end. They are read in a thread of their own, since a driver that
    sends nothing lets nothing interrupt it: after ten seconds without a frame the camera is taken for gone.

    Raises:
        DataError: not one frame came.
    """
    read: queue.Queue[Frame | Exception | None] = queue.Queue(maxsize=2)
    closed = threading.Event()

    def read_all() -> None:
        last: Exception | None = None
        try:
            with video:
                for frame in timed(video, from_first=True):
                    read.put(frame)
                    if closed.is_set():
                        return
        except Exception as error:
            last = error
        read.put(last)

    thread = threading.Thread(target=read_all, name="camera", daemon=True)
    thread.start()
    sent = 0
    try:
        with suppress(queue.Empty):
            while (frame := read.get(timeout=CAMERA_PATIENCE_S)) is not None:
                if isinstance(frame, Exception):
                    raise frame
                yield frame
                sent += 1
        if not sent:
            raise DataError(f"{video.path} sends no pictures. Close what else uses it, or plug it in again.")
    finally:
        closed.set()
        with suppress(queue.Empty):
            while True:
                read.get_nowait()
        thread.join(timeout=1)


@contextmanager
def until_interrupted(frames: Iterator[Frame]) -> Iterator[tuple[Iterator[Frame], threading.Event]]:
    """The frames up to the first Ctrl-C, which only ends them and sets the event; a second one stops the program as
    usual."""
    stopped = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield takewhile(lambda _: not stopped.is_set(), frames), stopped
    finally:
        signal.signal(signal.SIGINT, before)
