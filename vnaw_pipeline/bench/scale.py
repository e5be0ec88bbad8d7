"""Figures on growth: every stage but encoder and training, once, ten times and at the size of Aff-Wild2; and what
starting costs."""

import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from vnaw_pipeline.bench.data import (
    FULL_VIDEOS,
    TASK,
    make_videos,
    write_annotations,
    write_crops,
    write_run,
    write_store,
    write_template,
)
from vnaw_pipeline.bench.figure import Figure, Goal
from vnaw_pipeline.bench.measure import seconds
from vnaw_pipeline.bench.size import Size
from vnaw_pipeline.checks import check_manifest
from vnaw_pipeline.config import PipelineConfig, PredictConfig
from vnaw_pipeline.features.backends import computes_bf16
from vnaw_pipeline.features.bank import open_bank
from vnaw_pipeline.features.store import open_store
from vnaw_pipeline.manifests import build_manifest, read_manifest, write_manifest
from vnaw_pipeline.prediction.evaluate import evaluate_predictions
from vnaw_pipeline.prediction.predict import predict_videos, read_predictions
from vnaw_pipeline.prediction.submission import write_submission
from vnaw_pipeline.prediction.tune import tune_run
from vnaw_pipeline.processes import give_back_freed_memory, process_state
from vnaw_pipeline.windows.plan import plan_windows

_STAGE_GOAL = Goal("at most", 120.0)
_GOALS = {"store open": Goal("at most", 2.0), "window plan": Goal("at most", 1.0)}
_TOO_SHORT_S = 0.1
"""A stage that takes less at the second size says nothing about growth."""
_TIMED_ONCE_S = 10
"""A stage that takes less is timed three times: memory that a virtual machine never touched is slow to come."""


def measure_scale(work: Path, size: Size) -> list[Figure]:
    """Seconds of each stage at full scale, or as a line through the two largest sizes goes on to it; and the growth of
    the stage that grows most, as its factor in time over that in frames."""
    found = [_stages(work / str(num_videos), num_videos, size) for num_videos in size.scale_videos]
    frames = [sum(video.num_frames for video in make_videos(count)) for count in size.scale_videos]
    full = sum(video.num_frames for video in make_videos(FULL_VIDEOS))
    figures = []
    growth = {}
    for stage in found[0]:
        times = [of_size[stage] for of_size in found]
        slope = max(times[2] - times[1], 0) / (frames[2] - frames[1])
        seen = ", ".join(f"{time:.2f} s" for time in times)
        detail = f"{seen} at {', '.join(map(str, size.scale_videos))} videos"
        if frames[2] != full:
            detail += f"; by a line through the last two to {FULL_VIDEOS}"
        goal = _GOALS.get(stage.partition(",")[0], _STAGE_GOAL)
        figures.append(Figure(f"{stage}, s", times[2] + slope * (full - frames[2]), goal, detail))
        if times[1] >= _TOO_SHORT_S:
            growth[stage] = times[2] / times[1] / (frames[2] / frames[1])
    most = max(growth, key=lambda stage: growth[stage], default="")
    detail = (
        f"{most}, of the {len(growth)} stages that take {_TOO_SHORT_S} s at {frames[1]} frames, to {frames[2]} frames"
    )
    judged = Goal("at most", 1.5) if growth else None
    return [*figures, Figure("growth in time / in frames", growth.get(most, 0.0), judged, detail)]


def measure_start(work: Path, size: Size) -> list[Figure]:
    """What a user waits for before anything happens; each in a fresh process."""
    start = "import time; t = time.perf_counter(); import vnaw_pipeline; print(time.perf_counter() - t)"
    import_s = statistics.median(float(_run("-c", start)) for _ in range(size.repeats))
    help_s = statistics.median(seconds(lambda: _run("-m", "vnaw_pipeline", "--help")) for _ in range(size.repeats))
    bare_s = statistics.median(seconds(lambda: _run("-c", "pass")) for _ in range(size.repeats))
    return [
        Figure("vnaw --help, s", help_s, Goal("at most", 0.5), f"of which Python takes {bare_s:.2f} s to start"),
        Figure("import vnaw_pipeline, s", import_s, Goal("at most", 0.2), "within Python"),
    ]


def _stages(work: Path, num_videos: int, size: Size) -> dict[str, float]:
    """Seconds of each stage on so many videos."""
    videos = make_videos(num_videos)
    annotations, crops, template = work / "annotations", work / "crops", work / "template.txt"
    write_annotations(annotations, videos)
    write_crops(crops, videos, 32)
    write_template(template, videos)
    path = work / "manifest.csv"
    found: dict[str, float] = {}

    def timed(stage: str, run: Callable[[], object]) -> None:
        def taken() -> float:
            give_back_freed_memory()  # that a prediction kept, which no stage finds in a process of its own
            return seconds(run)

        first = taken()
        found[stage] = first if first > _TIMED_ONCE_S else statistics.median([first, taken(), taken()])

    timed("manifest", lambda: write_manifest(build_manifest(annotations, crops, TASK, template=template), path))
    timed("check", lambda: check_manifest(path, annotations, crops, TASK, template=template))
    video_ids = list(read_manifest(path).video_id)
    for width in size.widths:
        shutil.rmtree(work / "store.zarr", ignore_errors=True)  # that of the other width
        store = write_store(work / "store.zarr", videos, width)
        run = write_run(work / f"run{width}", store, PipelineConfig(temporal=size.temporal))
        timed(f"store open, {width} wide", lambda: open_store(store.path).require(video_ids))  # noqa: B023 -- run here
        timed(f"bank load, {width} wide", lambda: open_bank(store, video_ids, shown=False))  # noqa: B023
        timed(f"prediction, {width} wide", lambda: predict_videos(path, store.path, run.path, "test"))  # noqa: B023
        if computes_bf16(process_state().device):
            fast = PredictConfig(precision="bf16")
            timed(
                f"prediction in bf16, {width} wide",
                lambda: predict_videos(path, store.path, run.path, "test", fast),  # noqa: B023
            )
    lengths = torch.tensor([video.num_frames for video in videos])
    timed("window plan", lambda: plan_windows(lengths, 100, 10))
    predict_videos(path, store.path, run.path, "validation")
    timed("evaluation", lambda: evaluate_predictions(path, annotations, run.predictions("validation")))
    timed("tuning", lambda: tune_run(path, annotations, run.path))
    answers = read_predictions(run.predictions("test"), TASK)
    timed("submission", lambda: write_submission(answers, template, work / "submission.txt", TASK))
    return found


def _run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout
