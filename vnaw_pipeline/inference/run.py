"""The stage `infer`: any video, image or camera in; a table of frames, time lines, and an annotated copy out.

Reads: media files or a camera. Writes: for each input <out>/<name>/frames.csv and frames.json, summary.txt, for a
video timeline_person1.png ... and annotated.mp4, for an image annotated.png, and last record.json, by which a rerun
knows that it is done; <out>/status.csv (what failed). An annotated frame needs smoothed answers, which need frames
after it: so a video is read twice, first to be analysed, then to be drawn on, and memory does not grow with the pixels
of either. A camera's frames are kept in <out>/<name>/recording.mkv on the way, to be read again.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

from vnaw_pipeline.config import PipelineConfig, load_config
from vnaw_pipeline.crops.extract import crop_settings
from vnaw_pipeline.crops.video import Frame, Rgb, expected_frames, open_camera, open_video
from vnaw_pipeline.errors import ConfigError, DataError
from vnaw_pipeline.inference.analyse import Clock, Models, Spool, analyse, open_models
from vnaw_pipeline.inference.annotate import drawer, write_through
from vnaw_pipeline.inference.answers import frame_seconds, frame_table, summary_lines
from vnaw_pipeline.inference.inputs import (
    camera_frames,
    find_inputs,
    is_image,
    printable,
    read_image,
    require_file,
    timed,
    until_interrupted,
)
from vnaw_pipeline.provenance import (
    atomic_path,
    digest_bytes,
    environment,
    utc_now,
    write_bytes,
    write_json,
    write_text,
)
from vnaw_pipeline.report.figures import draw_timeline
from vnaw_pipeline.runs import Run, open_run
from vnaw_pipeline.stages import Failure, StageReport, progress_bar
from vnaw_pipeline.tasks import IGNORE_LABEL

_LOG = logging.getLogger(__name__)
_Read = Callable[[str, Path, Models, Clock, Callable[[int], None]], "_Outcome"]
_TABLES = ("summary.txt", "frames.csv", "frames.json")
_DRAWN = ("timeline*.png", "annotated.mp4", "annotated.png")
_EARLIER = (*_DRAWN, ".*.partial.*")
"""What is drawn for an input, and what a kill leaves of that; of an earlier one of the same name it goes."""
_RECORD = "record.json"
_TIMELINE_COLUMNS = 2000
_JSON_ROWS = 10_000


@dataclass(frozen=True)
class _Outcome:
    """What one input came to: the table, when the first frame begins and the last one ends, what could not be read."""

    table: pd.DataFrame
    num_frames: int
    span_s: tuple[float, float]
    loss: str | None = None


def infer_video(
    path: str | Path,
    *,
    encoder: str | None = None,
    run_dir: Path | None = None,
    config: PipelineConfig | None = None,
    allow_pickle: bool = False,
) -> pd.DataFrame:
    """The expressions of everyone in a video or an image, one row for each frame and person; nothing is written.

    The columns are those of `frame_table`. `encoder` names weights that ship or a file of ours, `run_dir` a run of
    `vnaw train`, `config` everything else (None: the run's, or the defaults). `allow_pickle` lets the config's
    `encoder.weights` be a .pth file.

    Raises:
        DataError: the file cannot be read, not even its first frame.
        CheckpointError, ConfigError: as `open_models`.
    """
    run = open_run(run_dir) if run_dir is not None else None
    config = config or (load_config(run.folder.config) if run is not None else PipelineConfig())
    with open_models(config, encoder, run, allow_pickle) as models:
        outcome = _analyse_file(Path(path).stem, Path(path), models, Clock(), lambda _: None)
    if outcome.loss is not None:
        _LOG.warning("%s: %s", path, outcome.loss)
    return outcome.table


def infer_videos(
    inputs: Sequence[Path],
    out_dir: Path,
    config: PipelineConfig,
    *,
    encoder: str | None = None,
    run: Run | None = None,
    camera: int | None = None,
    allow_pickle: bool = False,
) -> StageReport:
    """Read the expressions of everyone in videos, images, folders of them, or from a camera, and write what is found.

    One bad file does not raise; it is in the report, and the others are done. A video that breaks off is kept as far
    as it decodes and is in the report too. A camera ends with Ctrl-C. What is done, of the same content and with the
    same settings, is skipped.

    Raises:
        DataError: two inputs of one name.
        CheckpointError, ConfigError: as `open_models`; files and a camera together.
        OSError: the folder cannot be written to, or is full. Finished inputs stay.
    """
    if camera is not None and inputs:
        raise ConfigError("Give files to read, or a camera, and not both.")
    started = time.monotonic()
    report = StageReport("infer", units="inputs")
    report.write_status(out_dir / "status.csv")  # fails now, not after an hour, where nothing can be written
    read: _Read = _analyse_file
    paths = find_inputs(inputs)
    for name, path in paths.items():
        if path.resolve().parent == (out_dir / name).resolve() and any(map(path.match, _DRAWN)):
            raise DataError(f"{path} lies where its own results would, and they replace it. Give another --out.")
    if camera is not None:
        read = partial(_analyse_camera, camera)
        name = f"camera{camera}_{datetime.now():%Y%m%d-%H%M%S}"
        paths[name] = out_dir / name / "recording.mkv"
    # Each frame is analysed, then drawn on.
    twice = {name: 2 * (1 if is_image(path) else expected_frames(path)) for name, path in paths.items()}
    clock, video_s = Clock(), 0.0
    try:
        with (
            open_models(config, encoder, run, allow_pickle) as models,
            progress_bar("infer", sum(twice.values())) as bar,
        ):
            settings = _settings(models)
            for name, path in paths.items():
                if (record := _record_of(out_dir / name, path, settings)) is not None:
                    report.skipped += 1
                    report.notes += [f"{name}: {line}" for line in record["summary"]]
                    if record["loss"] is not None:
                        _fail(report, name, record["loss"])
                    bar.advance(twice[name])
                    continue
                try:
                    outcome = read(name, path, models, clock, bar.advance)
                    lines = _write_outcome(outcome, out_dir / name, path, models, clock, bar.advance)
                    _write_record(out_dir / name, path, settings, lines, outcome.loss)
                except DataError as error:
                    _fail(report, name, str(error))
                    continue
                report.done += 1
                report.frames += outcome.num_frames
                video_s += 0 if is_image(path) else outcome.span_s[1] - outcome.span_s[0]
                report.notes += [f"{name}: {line}" for line in lines]
                if outcome.loss is not None:
                    _fail(report, name, outcome.loss)
    finally:  # also when the disk is full or the run is stopped: what failed so far stays known
        report.write_status(out_dir / "status.csv")
    report.seconds = time.monotonic() - started
    if report.done:
        report.notes.append(_speed(clock, video_s, report.seconds))
    return report


def _settings(models: Models) -> str:
    """Digest of everything but the input that makes the results what they are."""
    tensors = models.encoder.head.state_dict().values() if models.encoder.head is not None else []
    weights = [tensor.cpu().numpy().tobytes() for tensor in tensors]
    if models.run is not None:
        weights.append(models.run.folder.best.read_bytes())
    named = [
        environment()["vnaw-pipeline"],
        models.config.model_dump(mode="json"),
        crop_settings(models.detector, models.config.crop),
        models.encoder.fingerprint(),
    ]
    return digest_bytes(json.dumps(named).encode(), *weights)


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _record_of(folder: Path, source: Path, settings: str) -> dict[str, Any] | None:
    """What is recorded of an input; None unless it is done, of this content and with these settings."""
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text())
        done = record["settings"] == settings and _sizes(folder) == record["files"]
        return record if done and record["input"] == _digest_of(source) else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or not one of ours
        return None


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the results that are there, by name."""
    found = sorted(chain.from_iterable(map(folder.glob, (*_TABLES, *_DRAWN))))
    return {path.name: path.stat().st_size for path in found}


def _write_record(folder: Path, source: Path, settings: str, summary: list[str], loss: str | None) -> None:
    write_json(
        folder / _RECORD,
        {
            **{"input": _digest_of(source), "settings": settings, "files": _sizes(folder)},
            **{"summary": summary, "loss": loss, "made": utc_now(), "environment": environment()},
        },
    )


def _fail(report: StageReport, name: str, reason: str) -> None:
    reason = printable(reason)  # it may hold the path
    report.failures.append(Failure(name, None, reason))
    report.notes.append(f"{name}: {reason}")


def _analyse_file(name: str, path: Path, models: Models, clock: Clock, advance: Callable[[int], None]) -> _Outcome:
    require_file(path)
    if is_image(path):
        return _analyse(name, iter([Frame(0, 0.0, read_image(path))]), models, clock, advance)
    with open_video(path) as video:
        outcome = _analyse(name, timed(video), models, clock, advance)
        return replace(outcome, loss=video.loss())


def _analyse_camera(
    number: int, name: str, recording: Path, models: Models, clock: Clock, advance: Callable[[int], None]
) -> _Outcome:
    video = open_camera(number)
    with closing(camera_frames(video)) as sent, until_interrupted(sent) as (frames, stopped):
        first = next(frames, None)
        if first is None:
            raise DataError("stopped before the first frame")  # and nothing is made for it
        recording.parent.mkdir(parents=True, exist_ok=True)
        outcome = _analyse(name, write_through(recording, chain([first], frames)), models, clock, advance)
        gone = f"camera {number} is gone; what it sent is kept ({video.loss() or 'it sends nothing more'})"
        return replace(outcome, loss=None if stopped.is_set() else gone)


def _analyse(
    name: str, frames: Iterator[Frame], models: Models, clock: Clock, advance: Callable[[int], None]
) -> _Outcome:
    with Spool(models.encoder.embedding_dim) as spool:
        sightings = analyse(frames, models, spool, clock, advance)
        table = frame_table(name, sightings, spool, models)
    time_s = sightings.time_s
    return _Outcome(table, len(time_s), (float(time_s[0]), float(time_s[-1]) + frame_seconds(time_s)))


def _write_outcome(
    outcome: _Outcome, folder: Path, source: Path, models: Models, clock: Clock, advance: Callable[[int], None]
) -> list[str]:
    """Write everything of one input; the lines of its summary."""
    table = outcome.table
    lines = summary_lines(table, models.config.infer.min_span_s)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise DataError(f"{folder} is a file; move it away, or give another --out") from error
    (folder / _RECORD).unlink(missing_ok=True)
    write_text(folder / "summary.txt", "\n".join(lines) + "\n")
    _write_table(table, folder)
    for earlier in chain.from_iterable(map(folder.glob, _EARLIER)):
        earlier.unlink()
    with clock("draw"):
        draw = drawer(table)
        if is_image(source):
            picture = cv2.cvtColor(draw(Frame(0, 0.0, read_image(source))), cv2.COLOR_RGB2BGR)
            write_bytes(folder / "annotated.png", cv2.imencode(".png", picture)[1].tobytes())
            advance(1)
            return lines
        _draw_timelines(outcome, folder, models)
        try:
            _write_copy(folder / "annotated.mp4", source, draw, source, advance)
        except DataError as error:
            lines = [*lines, f"annotated.mp4 is without its sound: {error}"]
            try:
                _write_copy(folder / "annotated.mp4", source, draw, None, lambda _: None)
            except DataError as again:
                lines[-1] = f"annotated.mp4 could not be written: {again}"
    return lines


def _write_copy(
    path: Path, source: Path, draw: Callable[[Frame], Rgb], sound_of: Path | None, advance: Callable[[int], None]
) -> None:
    with atomic_path(path) as partial_path, open_video(source) as video:
        frames = (frame._replace(rgb=draw(frame)) for frame in timed(video))
        for _ in write_through(partial_path, frames, sound_of):
            advance(1)


def _write_table(table: pd.DataFrame, folder: Path) -> None:
    """Write `frames.csv` and `frames.json` (a list of the same rows, null where a value is missing), piece by piece."""
    with atomic_path(folder / "frames.csv") as partial:
        table.to_csv(partial, index=False, lineterminator="\n")
    pieces = (table.iloc[start : start + _JSON_ROWS] for start in range(0, len(table), _JSON_ROWS))
    with atomic_path(folder / "frames.json") as partial, partial.open("w", encoding="utf-8") as file:
        for number, piece in enumerate(pieces):
            file.write(",\n" if number else "[\n")
            file.write(piece.to_json(orient="records", lines=True).strip().replace("\n", ",\n"))
        file.write("\n]\n")


def _draw_timelines(outcome: _Outcome, folder: Path, models: Models) -> None:
    """One figure a person over the whole video, so that they can be laid below each other; empty without anyone."""
    table = outcome.table
    frame_s = frame_seconds(np.unique(table.time_s))
    for person in table.person.dropna().unique() if table.person.notna().any() else [pd.NA]:
        nobody = pd.isna(person)
        rows = table if nobody else table[table.person == person]
        bands, probabilities = _timeline_columns(rows, outcome.span_s, frame_s, models.probability_columns)
        who = "no face found" if nobody else f"person {person}"
        path = folder / ("timeline.png" if nobody else f"timeline_person{person}.png")
        title = f"{table.video.iloc[0]}, {who}"
        draw_timeline(path, bands, probabilities, models.outputs, title, seconds=outcome.span_s)


def _timeline_columns(
    rows: pd.DataFrame, span_s: tuple[float, float], frame_s: float, names: list[str]
) -> tuple[dict[str, npt.NDArray[np.int64]], npt.NDArray[np.float32]]:
    """The answers at evenly spaced times, whatever the frame rate: the frame shown then, if it has one."""
    start, end = span_s
    times = start + (np.arange(_TIMELINE_COLUMNS) + 0.5) * (end - start) / _TIMELINE_COLUMNS
    time_s = rows.time_s.to_numpy()
    place = np.searchsorted(time_s, times, side="right") - 1
    shown = (place >= 0) & (times <= time_s[-1] + frame_s)
    codes = np.where(shown, rows.expression.cat.codes.to_numpy()[place], IGNORE_LABEL)
    probabilities = np.where(shown[:, None], np.nan_to_num(rows[names].to_numpy(np.float32)[place]), 0)
    return {"expression": codes.astype(np.int64)}, probabilities


def _speed(clock: Clock, video_s: float, seconds: float) -> str:
    total = sum(clock.seconds.values())
    shares = ", ".join(
        f"{part} {100 * spent / total:.0f} %"
        for part, spent in sorted(clock.seconds.items(), key=lambda part: -part[1])
    )
    rate = f"{video_s / seconds:.2f} x real time, " if video_s else ""
    return f"{rate}shares of the work: {shares}"
