"""From sightings to answers: one table of frames, and each person's expressions as spans of time.

`T` frames of the video, `n` of them from a person's first to their last, `K` expressions.
"""

from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from vnaw_pipeline.config import PredictConfig, WindowConfig
from vnaw_pipeline.features.bank import FeatureBank
from vnaw_pipeline.inference.analyse import Models, Sightings, Spool
from vnaw_pipeline.prediction.finish import finish_video
from vnaw_pipeline.prediction.smooth import Probabilities, fill_gaps, smooth_mean_by_time
from vnaw_pipeline.prediction.stitch import stitch_predictions
from vnaw_pipeline.report.figures import clock_time
from vnaw_pipeline.runs import Run

_BLOCK_FRAMES = 4096
_PLACE = ("x", "y", "width", "height", "score")


def frame_table(video: str, sightings: Sightings, spool: Spool, models: Models) -> pd.DataFrame:
    """One row for each person and frame from their first to their last, in the order of the frames; a frame that is
    nobody's has a row without a person.

    Columns: `video, person` (from 1, in order of appearance, then from the left), `frame_index, time_s, valid` (a face
    was found), `x, y, width, height, score` (in pixels, empty where not valid), `expression` (of the largest
    probability), `p_...`. A frame that is not valid has the interpolated probabilities of a short gap, or none.
    """
    rows_of = [np.flatnonzero(sightings.faces["track"] == track) for track in _people_of(sightings, models)]
    tables = [_person_table(person, rows, sightings, spool, models) for person, rows in enumerate(rows_of, 1)]
    of_people = [of_person.frame_index.to_numpy() for of_person in tables]
    of_nobody = np.setdiff1d(np.arange(len(sightings.time_s)), np.concatenate([[], *of_people]))
    if len(of_nobody):
        no_answer = np.full((len(of_nobody), len(models.outputs)), np.nan, np.float32)
        tables.append(_rows(None, of_nobody, np.zeros(0, np.int64), no_answer, sightings, models))
    table = pd.concat(tables).sort_values("frame_index", kind="stable", ignore_index=True)
    return table.assign(video=pd.Categorical([video]).repeat(len(table)))[["video", *table.columns]]


def _people_of(sightings: Sightings, models: Models) -> list[int]:
    """The tracks that are people, in order of appearance and then from left to right."""
    least = min(models.config.infer.min_person_frames, len(sightings.time_s))
    tracks, first, counts = np.unique(sightings.faces["track"], return_index=True, return_counts=True)
    kept = counts >= least
    begin = sightings.faces[first[kept]]
    order = np.lexsort((begin["box"][:, 0], begin["frame_index"]))
    return [int(track) for track in tracks[kept][order]]


def _person_table(
    person: int, rows: npt.NDArray[np.int64], sightings: Sightings, spool: Spool, models: Models
) -> pd.DataFrame:
    seen = sightings.faces["frame_index"][rows]
    frames = np.arange(seen[0], seen[-1] + 1)
    valid = np.isin(frames, seen)
    time_s = sightings.time_s[frames]
    infer = models.config.infer
    if models.run is not None:
        raw = _temporal_probabilities(models.run, models, sightings, rows, spool)
        config = models.config.predict.of_task(models.run.task.name)
        final = finish(raw, valid, time_s, infer.fill_gaps_s, config)
    else:
        raw = np.zeros((len(frames), len(models.outputs)), np.float32)
        raw[valid] = _head_probabilities(rows, spool, models)
        final = finish(raw, valid, time_s, infer.fill_gaps_s, infer.smooth_s)
    return _rows(person, frames, rows, final, sightings, models)


def frame_seconds(time_s: npt.NDArray[np.float64]) -> float:
    """How long a frame of these times (T,) usually lasts; a single one, or without times, as at 25 a second."""
    return (float(np.median(np.diff(time_s))) if len(time_s) > 1 else 0.0) or 1 / 25


def finish(
    raw: Probabilities,
    valid: npt.NDArray[np.bool_],
    time_s: npt.NDArray[np.float64],
    fill_gaps_s: float,
    after: PredictConfig | float,
) -> Probabilities:
    """Final answers, interpolated over gaps of at most `fill_gaps_s`; (n, K) -> (n, K), NaN in longer gaps.

    `after`: what follows, as `vnaw predict` does it, or the mean over so many seconds to either side. The stretches
    between long gaps know nothing of each other. The first and last frames are valid.
    """
    final = np.full_like(raw, np.nan)
    known = np.flatnonzero(valid)
    breaks = np.flatnonzero((np.diff(known) > 1) & (np.diff(time_s[known]) > fill_gaps_s)) + 1
    for stretch in np.split(known, breaks):
        inside = slice(stretch[0], stretch[-1] + 1)
        if isinstance(after, PredictConfig):
            final[inside] = finish_video(raw[inside], valid[inside], raw[0], after, "classes")
        else:
            filled = fill_gaps(raw[inside], valid[inside], raw[0])
            final[inside] = smooth_mean_by_time(filled, time_s[inside], after)
    return final


def _head_probabilities(rows: npt.NDArray[np.int64], spool: Spool, models: Models) -> Probabilities:
    """What the encoder's head makes of single frames, for a person's rows of the spool."""
    answers = []
    for block in np.split(rows, range(_BLOCK_FRAMES, len(rows), _BLOCK_FRAMES)):
        with torch.inference_mode():
            assert models.encoder.head is not None  # `open_models` made sure
            logits = models.encoder.head(torch.from_numpy(spool.read(block)).float())
        answers.append(logits.softmax(dim=-1).numpy())
    return np.concatenate(answers)


def _temporal_probabilities(
    run: Run, models: Models, sightings: Sightings, rows: npt.NDArray[np.int64], spool: Spool
) -> Probabilities:
    """The temporal model's answers for a person, as `vnaw predict` gives them: windows start where those of the whole
    video do, whenever the person came; but only a block of frames is in memory at a time."""
    num_frames = len(sightings.time_s)
    seen = sightings.faces["frame_index"][rows]
    first, last = int(seen[0]), int(seen[-1]) + 1
    answers = np.zeros((last - first, len(models.outputs)), np.float32)
    for start in range(first, last, _BLOCK_FRAMES):
        stop = min(start + _BLOCK_FRAMES, last)
        low, high = window_span(start, stop, num_frames, run.config.windows)
        inside = rows[(seen >= low) & (seen < high)]
        if not len(inside):
            continue
        embeddings = torch.zeros(high - low + 1, models.encoder.embedding_dim, dtype=torch.float16)
        valid = torch.zeros(high - low + 1, dtype=torch.bool)
        places = torch.from_numpy(sightings.faces["frame_index"][inside].astype(np.int64) - low)
        embeddings[places] = torch.from_numpy(spool.read(inside))
        valid[places] = True
        bank = FeatureBank(["block"], embeddings, valid, torch.tensor([0, high - low]))
        stitched = stitch_predictions(run.model, bank, run.config.tasks, run.config.windows, models.config.predict)
        expressions = stitched[start - low : stop - low, : len(models.outputs)]  # the main task's stand first
        answers[start - first : stop - first] = expressions.numpy()
    return answers


def window_span(start: int, stop: int, num_frames: int, windows: WindowConfig) -> tuple[int, int]:
    """Frames that hold every window over frames [start, stop) of a video, and in which, taken for a video of their
    own, windows start at the same frames."""
    length, stride = windows.window_frames, windows.predict_stride
    low = max(0, start - length) // stride * stride
    high = low + -(-(stop - 1 - low) // stride) * stride + length
    return low, min(high, num_frames)


def _rows(
    person: int | None,
    frames: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    probabilities: Probabilities,
    sightings: Sightings,
    models: Models,
) -> pd.DataFrame:
    """The table of one person: `rows` are their sightings, `probabilities` is (n, K) over their `frames`."""
    seen = sightings.faces["frame_index"][rows] - frames[0]
    place = np.full((len(frames), len(_PLACE)), np.nan)
    box = sightings.faces["box"][rows].astype(np.float64)
    place[seen] = np.column_stack([box[:, :2], box[:, 2:] - box[:, :2], sightings.faces["score"][rows]])
    valid = np.zeros(len(frames), np.bool_)
    valid[seen] = True
    answered = np.isfinite(probabilities[:, 0])
    best = np.where(answered, np.nan_to_num(probabilities).argmax(axis=1), -1)
    return pd.DataFrame(
        {
            "person": pd.array([person], dtype="Int16").repeat(len(frames)),
            "frame_index": frames.astype(np.int32),
            "time_s": sightings.time_s[frames].round(6),
            "valid": valid,
            **{name: place[:, column].round(4 if name == "score" else 2) for column, name in enumerate(_PLACE)},
            "expression": pd.Categorical.from_codes(best, pd.Index(models.outputs)),
            **{
                name: probabilities[:, column].astype(np.float64).round(6)
                for column, name in enumerate(models.probability_columns)
            },
        }
    )


def spans_of(table: pd.DataFrame, min_span_s: float, frame_s: float) -> list[tuple[float, float, str]]:
    """One person's expressions as (start, end, name) in seconds; gaps without an answer belong to none.

    A span shorter than `min_span_s` goes, the shortest first, to the longer of the spans that touch it. A frame lasts
    until the next one, the last one `frame_s`.
    """
    codes = table.expression.cat.codes.to_numpy()
    time_s = table.time_s.to_numpy()
    end_s = np.append(time_s[1:], time_s[-1] + frame_s)
    bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    least_s = min_span_s - frame_s / 2  # spans are whole frames, times are rounded
    runs = [[start, stop, int(codes[start])] for start, stop in pairwise(bounds)]

    def seconds(run: list[int]) -> float:
        return round(float(end_s[run[1] - 1] - time_s[run[0]]), 4)  # times are rounded; equally long ones stay so

    def touching(place: int) -> list[int]:
        return [near for near in (place - 1, place + 1) if 0 <= near < len(runs) and runs[near][2] >= 0]

    while short := [
        place for place, run in enumerate(runs) if run[2] >= 0 and seconds(run) < least_s and touching(place)
    ]:
        settled: set[int] = set()
        for place in sorted(short, key=lambda place: seconds(runs[place])):
            near = max(touching(place), key=lambda near: seconds(runs[near]))
            if not settled & {place, near}:  # else it waits for the next round, with what it touches then
                runs[place][2] = runs[near][2]
                settled |= {place, near}
        runs = [
            [together[0][0], together[-1][1], code]
            for code, together in ((code, list(group)) for code, group in groupby(runs, key=lambda run: run[2]))
        ]
    names = table.expression.cat.categories
    return [(float(time_s[r[0]]), float(end_s[r[1] - 1]), str(names[r[2]])) for r in runs if r[2] >= 0]


def summary_lines(table: pd.DataFrame, min_span_s: float) -> list[str]:
    """A line a person: `person 1: 0:00-0:05 Sadness, 0:11-0:19 Happiness`; of an image only the expression."""
    if table.person.isna().all():
        return ["no face found"]
    times = np.unique(table.time_s)
    frame_s = frame_seconds(times)
    lines = []
    for person, of_person in table.groupby("person"):
        said = []
        for start, end, name in spans_of(of_person, min_span_s, frame_s):
            ends = dict.fromkeys([clock_time(start), clock_time(end)])  # one, where both round to it
            said.append(f"{'-'.join(ends)} {name}" if len(times) > 1 else name)
        lines.append(f"person {person}: {', '.join(said)}")
    return lines
