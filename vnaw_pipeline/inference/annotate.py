"""The annotated copy: boxes, people and expressions drawn on every frame, with the times and the sound of the video."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import cv2
import numpy as np
import pandas as pd
from av.container import InputContainer, OutputContainer
from av.video.stream import VideoStream

from vnaw_pipeline.crops.video import Frame, Rgb, open_container
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.inference.inputs import JUMP_S
from vnaw_pipeline.report.figures import CLASS_COLOURS

_LOG = logging.getLogger(__name__)
_TICKS = 60_000
"""Steps of a second for frame times: whole numbers for the usual frame rates, and what MPEG-4 can still count."""
_MP4_SOUND = {"aac", "mp3", "ac3", "eac3", "opus", "alac"}
"""Sound that players expect in an MP4; other sound is encoded again, as AAC."""
_MP4_MP3_RATE = 16_000
"""Least samples a second of the MP3 sound that an MP4 takes."""
_HOLE_S = 0.1
"""Sound that is missing for longer leaves a silence; less is rounding."""
_LEAST_TEXT = 0.35
"""Of OpenCV's font: what is smaller cannot be read."""
_Sound = Iterator[tuple[float, list[Any]]]
"""Packets (of av, which cannot be named with its type) and when they begin, in seconds."""


def drawer(table: pd.DataFrame) -> Callable[[Frame], Rgb]:
    """A function that draws on a frame, in place, the rows of the table that are valid there."""
    valid = table.loc[table.valid].sort_values("frame_index", kind="stable")
    frame_index, person, code = (
        column.to_numpy() for column in (valid.frame_index, valid.person, valid.expression.cat.codes)
    )
    place = valid[["x", "y", "width", "height"]].to_numpy().round().astype(int)
    probability = valid.filter(regex="^p_").max(axis=1).to_numpy()
    names = valid.expression.cat.categories

    def draw(frame: Frame) -> Rgb:
        for row in range(*np.searchsorted(frame_index, [frame.frame_index, frame.frame_index + 1])):
            label = f"{person[row]} {names[code[row]]} {100 * probability[row]:.0f}%"
            _draw_face(frame.rgb, place[row].tolist(), label, CLASS_COLOURS[code[row]])
        return frame.rgb

    return draw


def _draw_face(rgb: Rgb, place: list[int], label: str, colour: str) -> None:
    """A box, and the label above it on a plate of the same colour; inside the picture, whatever the box."""
    ink = tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))
    x, y, width, height = place
    line = max(1, round(max(rgb.shape[:2]) / 400))
    cv2.rectangle(rgb, (x, y), (x + width, y + height), ink, line)
    size = max(max(rgb.shape[:2]) / 1300, _LEAST_TEXT)
    (text_width, text_height), below = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, size, line)
    left = min(max(x, 0), max(0, rgb.shape[1] - text_width))
    foot = max(y - below, text_height + below)
    cv2.rectangle(rgb, (left, foot - text_height - below), (left + text_width, foot + below), ink, cv2.FILLED)
    dark = (20, 20, 20) if sum(ink) > 330 else (255, 255, 255)
    cv2.putText(rgb, label, (left, foot), cv2.FONT_HERSHEY_SIMPLEX, size, dark, line, cv2.LINE_AA)


def write_through(path: Path, frames: Iterable[Frame], sound_of: Path | None = None) -> Iterator[Frame]:
    """Write frames into a video file at their own times, and hand each on once it is written.

    H.264 (MPEG-4 where FFmpeg has no x264), sides rounded up to even ones. A frame of another size, as some streams
    switch to, is scaled to that of the first. `sound_of`: the file whose first sound track goes with the frames.

    Raises:
        DataError: FFmpeg refuses the pictures or the sound.
    """
    with ExitStack() as stack:
        stack.enter_context(_refusals_named(path))
        out = stack.enter_context(av.open(f"file:{path}", "w"))
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        options = {"preset": "ultrafast", "crf": "21"} if codec == "libx264" else {}
        stream = cast(VideoStream, out.add_stream(codec, rate=25, options=options))
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, _TICKS)
        sound = _open_sound(sound_of, out, stack) if sound_of is not None else iter(())
        waiting = next(sound, None)
        last = None
        for frame in frames:
            height, width = frame.rgb.shape[:2]
            if last is None:
                stream.width, stream.height = width + width % 2, height + height % 2
            picture = av.VideoFrame.from_ndarray(_fitted(frame.rgb, stream.width, stream.height), format="rgb24")
            tick = round(frame.time_s * _TICKS)
            last = tick if last is None else max(tick, last + 1)  # some files repeat a time or step back
            picture.pts, picture.time_base = last, Fraction(1, _TICKS)
            out.mux(stream.encode(picture))
            while waiting is not None and waiting[0] <= frame.time_s:
                out.mux(waiting[1])
                waiting = next(sound, None)
            yield frame
        if last is None:
            return
        out.mux(stream.encode())
        while waiting is not None:
            out.mux(waiting[1])
            waiting = next(sound, None)


@contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):  # such as a full disk
            raise
        raise DataError(f"no video could be written as {path.suffix}: {error}") from error


def _fitted(rgb: Rgb, width: int, height: int) -> Rgb:
    down, right = height - rgb.shape[0], width - rgb.shape[1]
    if (down, right) == (0, 0):
        return rgb
    if 0 <= down <= 1 and 0 <= right <= 1:
        return np.pad(rgb, ((0, down), (0, right), (0, 0)), mode="edge")
    return cv2.resize(rgb, (width, height)).astype(np.uint8, copy=False)


def _open_sound(path: Path, out: OutputContainer, stack: ExitStack) -> _Sound:
    """Add a stream for the sound of a file to `out`, and give its packets by time; none if it has no sound."""
    source = stack.enter_context(open_container(path))
    if not source.streams.audio or not source.streams.audio[0].codec_context:
        return iter(())
    given = source.streams.audio[0].codec_context
    name = given.codec.canonical_name
    if name in _MP4_SOUND and (name != "mp3" or given.sample_rate >= _MP4_MP3_RATE):
        return _copied(source, out)
    return _encoded(source, out)


def _copied(source: InputContainer, out: OutputContainer) -> _Sound:
    given = source.streams.audio[0]
    stream = out.add_stream_from_template(given)

    def packets() -> _Sound:
        latest, shift = None, 0
        with suppress(av.error.FFmpegError):  # a broken tail: the sound ends here, the pictures are kept
            for packet in source.demux(given):
                if packet.dts is None or packet.pts is None or packet.time_base is None:
                    continue
                if latest is None:
                    shift = -round(_start_s(source) / packet.time_base)
                elif packet.dts + shift <= latest:  # an MP4 takes rising times only
                    if (latest - packet.dts - shift) * packet.time_base <= JUMP_S:
                        continue
                    shift = latest + max(packet.duration or 1, 1) - packet.dts
                packet.dts, packet.pts = packet.dts + shift, packet.pts + shift
                latest = packet.dts
                packet.stream = stream
                yield float(latest * packet.time_base), [packet]

    return packets()


def _encoded(source: InputContainer, out: OutputContainer) -> _Sound:
    given = source.streams.audio[0]
    layout = "mono" if given.layout.nb_channels == 1 else "stereo"  # PCM often does not say which channels it holds
    rate = min(av.Codec("aac", "w").audio_rates or [given.rate], key=lambda rate: abs(rate - given.rate))
    stream = out.add_stream("aac", rate=rate, layout=layout)

    def packets() -> _Sound:
        samples = 0  # counted, as containers such as AVI round the times of sound
        with suppress(ValueError):  # the channels change in the middle
            for frame in _decoded(source):
                begins = round(((frame.time or 0) - _start_s(source)) * given.rate)
                if begins > samples + given.rate * _HOLE_S:
                    samples = begins
                frame.pts, frame.time_base = samples, Fraction(1, given.rate)
                yield samples / given.rate, stream.encode(frame)
                samples += frame.samples
        yield float("inf"), stream.encode()

    return packets()


def _decoded(source: InputContainer) -> Iterator[av.AudioFrame]:
    """The sound of a file as far as it decodes; damaged packets in the middle are left out."""
    damaged = 0
    with suppress(av.error.FFmpegError):  # a broken tail
        for packet in source.demux(source.streams.audio[0]):
            try:
                yield from packet.decode()
            except av.error.FFmpegError:
                damaged += 1
    if damaged:
        _LOG.warning("%s: %d packets of the sound are damaged; the copy is silent there.", source.name, damaged)


def _start_s(source: InputContainer) -> float:
    """Where the file's clock begins; the times of frames count from there."""
    return (source.start_time or 0) / av.time_base
