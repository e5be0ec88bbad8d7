"""Frames of a video file, one at a time, upright, with what was lost on the way.

frame_index counts decoded frames in display order, so a variable frame rate leaves no gaps; the time of each
frame comes from its own timestamp. Memory does not grow with the length of the video. Pixels are square: pictures
that are stored with others, as DV and HDV have them, are stretched to the shape in which a player shows them.
"""

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from vnaw_pipeline.errors import DataError

Rgb = npt.NDArray[np.uint8]
"""(H, W, 3) uint8, RGB in [0, 255]."""

_SILENT_LOSS_S = 1.0
"""Where a container stores no frame count: seconds missing at the end that count as a loss. Sound that runs on a
little after the last frame is normal."""

_MOST_STRETCH = 5
"""Pixels that are more times as wide as high, or as high as wide, are a mistake (broadcasts have up to 3), and frames
stretched by it might not fit into memory."""

_CAMERA_FORMAT = "v4l2"

_MATROSKA_DURATION = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")


class Frame(NamedTuple):
    """One decoded frame: its 0-based index, its time in seconds (NaN: the file has no times), its pixels."""

    frame_index: int
    time_s: float
    rgb: Rgb


class VideoReader:
    """An open video; iterate once over its frames, then ask for `loss()`.

    `fps` is the average frame rate (NaN: unknown); `expected_frames` is the count that the container stores or
    that follows from its duration (None: neither is there). `start_s` is where the container's clock begins.
    """

    def __init__(self, path: Path, container: InputContainer) -> None:
        self.path = path
        self._container = container
        try:
            self._stream = _decodable(video_stream(self._container, path), path)
        except DataError:
            self._container.close()
            raise
        # Frame threading drops the last good frames when a file breaks off; slices do not.
        self._stream.thread_type = "SLICE"
        self.fps = float(self._stream.average_rate or math.nan)
        self._duration_s = _duration_s(self._container.duration, self._stream)
        self._stored_frames = self._stream.frames
        if self._container.format.name == "avi" and self._stored_frames and self._stream.average_rate:
            # Its count has pictures that were left out, as the one before stays; and FFmpeg takes its duration from
            # what is left of the file.
            self._duration_s, self._stored_frames = self._stored_frames / self.fps, 0
        self.expected_frames = _expected_frames(self._stored_frames, self._duration_s, self.fps)
        self.start_s = (self._container.start_time or 0) / av.time_base
        self._pixel_ratio = self._stream.sample_aspect_ratio or Fraction(1)  # None or 0: the file does not say
        self.decoded_frames = 0
        self._end_s = math.nan
        self._num_errors = 0
        self._first_error: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        """Yield every frame that decodes; undecodable parts are skipped and counted.

        Raises:
            DataError: not one frame could be decoded, or its pixels have an impossible shape.
        """
        if not Fraction(1, _MOST_STRETCH) <= self._pixel_ratio <= _MOST_STRETCH:
            raise DataError(
                f"{self.path}: its pixels are said to be {float(self._pixel_ratio):.4g} times as wide as high; "
                f"expected 1/{_MOST_STRETCH} to {_MOST_STRETCH}. Write it anew with its true shape, by "
                "`ffmpeg -i OLD -c copy -aspect 16:9 NEW` say."
            )
        matrix = None
        for decoded in self._decode():
            if not self.decoded_frames:
                # It holds for the whole stream; and asking a frame for its side data ties it into a reference
                # cycle, so that hundreds of frames would wait for the garbage collector.
                matrix = _display_matrix(decoded)
            time_s = math.nan if decoded.time is None else float(decoded.time)
            self._end_s = time_s
            try:
                # FFmpeg stretches while it converts colours; for square pixels this is the frame's own size.
                width, height = square_size(decoded.width, decoded.height, self._pixel_ratio)
                stored = cast(Rgb, decoded.to_ndarray(format="rgb24", width=width, height=height))
            except av.error.FFmpegError as error:
                self._note(error)
                continue
            rgb = upright(stored, matrix)
            yield Frame(self.decoded_frames, time_s, rgb)
            self.decoded_frames += 1
        if not self.decoded_frames:
            cause = f" ({self._first_error})" if self._num_errors else ""
            raise DataError(f"{self.path}: not one frame could be decoded{cause}. The file is empty or damaged.")

    def loss(self) -> str | None:
        """What of the video could not be decoded, in one sentence; None if all of it was."""
        expected = self.expected_frames
        lost = max(0, expected - self.decoded_frames) if expected is not None else 0
        if not self._num_errors and not (lost if self._stored_frames else self._ends_early()):
            return None
        cause = self._first_error or "the file ends early"
        if lost:
            about = "" if self._stored_frames else "about "
            return f"{lost} of {about}{expected} frames lost, {self.decoded_frames} decoded: {cause}"
        return f"some frames lost, {self.decoded_frames} decoded: {self._num_errors} damaged parts, first: {cause}"

    def _ends_early(self) -> bool:
        return self._duration_s - (self._end_s - self.start_s) > _SILENT_LOSS_S

    def _decode(self) -> Iterator[av.VideoFrame]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError as error:  # the container itself is broken here: nothing follows
                self._note(error)
                return
            try:
                decoded = packet.decode()
            except av.error.FFmpegError as error:  # this packet is broken: the next may not be
                self._note(error)
                continue
            yield from decoded

    def _note(self, error: av.error.FFmpegError) -> None:
        self._num_errors += 1
        self._first_error = self._first_error or _describe(error)


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first stream of moving pictures; a cover image is none.

    Raises:
        DataError: there is none.
    """
    pictures = Disposition.attached_pic | Disposition.still_image
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise DataError(f"{path} holds no video stream, only sound, pictures or data. Give a video file.")
    return streams[0]


def _decodable(stream: VideoStream, path: Path) -> VideoStream:
    if not stream.codec_context:
        raise DataError(f"{path}: FFmpeg has no decoder here for its pictures. Convert it, to H.264 say.")
    return stream


def open_container(path: Path) -> InputContainer:
    """A media file as FFmpeg opens it. A tag that is not UTF-8, such as an old title, is no reason not to."""
    # The scheme keeps FFmpeg from reading a colon in a file name as a protocol.
    return av.open(f"file:{path}", metadata_errors="replace")


def expected_frames(path: Path) -> int:
    """Frames that a video's container promises, for a progress bar; 0 where it says nothing or cannot be opened."""
    try:
        with open_video(path) as video:
            return video.expected_frames or 0
    except DataError:
        return 0


def open_video(path: Path) -> VideoReader:
    """Open a video for `with open_video(path) as video: for frame in video: ...`.

    Raises:
        DataError: no such file, not a video, or no video stream in it.
    """
    try:
        container = open_container(path)
    except av.error.FFmpegError as error:
        raise DataError(_why_not_opened(path, error)) from error
    return VideoReader(path, container)


def open_camera(number: int) -> VideoReader:
    """Open a camera of this machine (Linux: /dev/video<number>); its frames go on until it is closed or gone. A driver
    that sends nothing may keep the reading thread for good.

    Raises:
        DataError: there is no such camera, or another program has it.
    """
    device = Path(f"/dev/video{number}")
    try:
        container = av.open(str(device), format=_CAMERA_FORMAT)
    except (av.error.FFmpegError, ValueError) as error:
        found = ", ".join(sorted(path.name for path in device.parent.glob("video[0-9]*"))) or "none"
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise DataError(f"Camera {number} ({device}) cannot be opened: {reason}. Cameras here: {found}.") from error
    return VideoReader(device, container)


def square_size(width: int, height: int, pixel_ratio: Fraction) -> tuple[int, int]:
    """Width and height of a stored frame once its pixels, `pixel_ratio` times as wide as high, are made square. One
    side grows and none shrinks, so that no detail is lost."""
    square = Fraction(1)
    return round(width * max(pixel_ratio, square)), round(height / min(pixel_ratio, square))


def upright(rgb: Rgb, display_matrix: npt.NDArray[np.int32] | None) -> Rgb:
    """Turn and mirror a stored frame as its display matrix says, in steps of 90 degrees.

    Args:
        rgb: (H, W, 3), as stored, of square pixels.
        display_matrix: (3, 3); a stored point (x, y) is shown at (a x + c y, b x + d y) with rows (a, b, ..) and
            (c, d, ..). None: as stored.

    Returns:
        (H, W, 3) or (W, H, 3), contiguous.
    """
    if display_matrix is None:
        return rgb
    (a, b), (c, d) = display_matrix[:2, :2].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        rgb = rgb.swapaxes(0, 1)
        mirror_x, mirror_y = c < 0, b < 0
    else:
        mirror_x, mirror_y = a < 0, d < 0
    return np.ascontiguousarray(rgb[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1])


def _display_matrix(frame: av.VideoFrame) -> npt.NDArray[np.int32] | None:
    side_data: Any = frame.side_data.get("DISPLAYMATRIX")
    return None if side_data is None else np.frombuffer(bytes(side_data), np.int32).reshape(3, 3)


def _duration_s(container_us: int | None, stream: VideoStream) -> float:
    """Shorter of the two: sound may run on after the last frame, and a trimmed stream counts what is cut off."""
    candidates = [math.inf]
    if container_us:
        candidates.append(container_us / av.time_base)
    if stream.duration and stream.time_base:
        candidates.append(float(stream.duration * stream.time_base))
    if tag := _MATROSKA_DURATION.fullmatch(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, tag.groups())
        candidates.append(3600 * hours + 60 * minutes + seconds)
    shortest = min(candidates)
    return shortest if math.isfinite(shortest) else math.nan


def _expected_frames(stored: int, duration_s: float, fps: float) -> int | None:
    estimate = duration_s * fps
    if not math.isfinite(estimate):
        return stored or None
    return min(stored or round(estimate), round(estimate))


def _why_not_opened(path: Path, error: av.error.FFmpegError) -> str:
    if not path.exists():
        return f"No such video: {path}."
    if not path.is_file():
        return f"{path} is not a file. Give video files."
    return f"{path} cannot be read as a video ({_describe(error)}). It is of another kind, or its header is damaged."


def _describe(error: av.error.FFmpegError) -> str:
    return str(error.strerror or error)
