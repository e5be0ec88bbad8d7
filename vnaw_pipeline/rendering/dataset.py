"""An Aff-Wild2-shaped data set of drawn faces, on disk.

Writes, below one root: `annotations/` as the challenge ships them, `truth/` with the same tree and the true labels of
every frame (test videos too), `crops/`, the test lists and the submission templates, and last `rendered.json`. A root
whose `rendered.json` says that it was completed with the same plan and seed is left as it is.
"""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vnaw_pipeline.annotations import Labels, image_name, write_annotation
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.provenance import write_json, write_text
from vnaw_pipeline.rendering.annotators import annotate_expressions, unannotated
from vnaw_pipeline.rendering.camera import Exposure, encode_picture, sample_background, sample_noise, take_picture
from vnaw_pipeline.rendering.face import CROP_PX, Hand, draw_face
from vnaw_pipeline.rendering.identity import Identity, sample_identity
from vnaw_pipeline.rendering.plan import DatasetPlan, VideoPlan, plan_videos
from vnaw_pipeline.rendering.schedule import schedule_expressions
from vnaw_pipeline.rendering.script import VideoScript, affect_of, present_units, write_script
from vnaw_pipeline.stages import StageReport, progress_bar, usable_cores
from vnaw_pipeline.tasks import EXPRESSIONS, IGNORE_LABEL, SPLIT_DIRS, SPLITS, TASKS, TaskName

RECORD_NAME = "rendered.json"
TEST_DIR = "Test_Set"
"""Folder of the test videos' truth; the challenge has no such annotations."""

_DRAWING = 1  # raise when the same plan and seed give other files than before
_LISTS_DIR, _TEMPLATES_DIR = "names_of_videos_in_each_test_set", "test_set_examples"
_PARTS = ("annotations", "truth", "crops", _LISTS_DIR, _TEMPLATES_DIR)
_TEST_FILES: dict[TaskName, tuple[str, str, str]] = {
    "expr8": ("Expression_Recognition", "Expr", "0"),
    "va": ("Valence_Arousal_Estimation", "VA", "0.5,-0.5"),
    "au": ("Action_Unit_Detection", "AU", ",".join("0" * 12)),
}
"""Task -> name of its list of test videos, name of its template, and what a template's rows hold."""


@dataclass(frozen=True)
class ComposedVideo:
    """One video before it is drawn: who, what happens, what annotators say, and where no face was found.

    `given` and `truth` hold, by task, the labels of the first `plan.num_rows` frames; a test video has no `given`.
    `face_found` (num_images,) is False where a frame has no image.
    """

    plan: VideoPlan
    identity: Identity
    script: VideoScript
    truth: dict[TaskName, Labels]
    given: dict[TaskName, Labels]
    face_found: NDArray[np.bool_]
    drawing_seed: np.random.SeedSequence


def render_dataset(
    root: Path,
    plan: DatasetPlan | None = None,
    seed: int = 0,
    *,
    workers: int | None = None,
    shown: bool = True,
) -> StageReport:
    """Render a data set below `root`, whole; the bytes depend on the plan and the seed only.

    Args:
        plan: None: the demo's.
        workers: processes that draw; None: one for every core this process may use.
        shown: show a progress bar.

    Returns:
        A report whose notes say what was measured on the labels; `skipped` counts the videos if all was there already.

    Raises:
        DataError: `root` holds annotations or crops that were not rendered by this function, or cannot be written.
    """
    started = time.monotonic()
    plan = plan or DatasetPlan()
    wanted = {"drawing": _DRAWING, "seed": seed, "plan": json.loads(json.dumps(asdict(plan)))}
    record = _read_record(root)
    report = StageReport("render")
    if record.get("complete") and record.get("made_by") == wanted and record.get("files") == _count_files(root):
        report.skipped, report.notes = record["videos"], record["measured"]
        report.seconds = time.monotonic() - started
        return report
    videos = compose_videos(plan, seed)
    report.done, report.notes = len(videos), measure(videos)
    report.frames = sum(video.plan.num_images for video in videos)
    try:
        _clear(root, record)
        write_json(root / RECORD_NAME, {"complete": False, "made_by": wanted})
        write_annotations(root, videos)
        with progress_bar("render", report.frames, shown=shown) as bar:
            draw_videos(root, videos, plan.jpeg_quality, workers or usable_cores(), bar.advance)
        finished = {"videos": len(videos), "files": _count_files(root), "measured": report.notes}
        write_json(root / RECORD_NAME, {"complete": True, "made_by": wanted, **finished})
    except OSError as error:
        raise DataError(
            f"Cannot render into {root}: {error.strerror} ({error.filename}). "
            "Make room or give another folder; a rerun begins the rendering again."
        ) from error
    report.seconds = time.monotonic() - started
    return report


def render_annotations(root: Path, plan: DatasetPlan | None = None, seed: int = 0) -> None:
    """Write all that `render_dataset` writes but the pictures: each video's crop folder is made, and left empty."""
    write_annotations(root, compose_videos(plan or DatasetPlan(), seed))


def compose_videos(plan: DatasetPlan, seed: int) -> list[ComposedVideo]:
    """Decide everything about all videos. A video's own random numbers depend on the seed and its position only."""
    planning, *rest = np.random.SeedSequence(seed).spawn(1 + len(SPLITS))
    videos = plan_videos(plan, np.random.default_rng(planning))
    composed = []
    for split, split_seed in zip(SPLITS, rest, strict=True):
        chosen = [video for video in videos if video.split == split]
        composed += _compose_split(chosen, plan, split_seed)
    return composed


def _compose_split(videos: Sequence[VideoPlan], plan: DatasetPlan, seed: np.random.SeedSequence) -> list[ComposedVideo]:
    schedule_seed, annotator_seed, *video_seeds = seed.spawn(2 + len(videos))
    schedule = schedule_expressions([video.num_frames for video in videos], np.random.default_rng(schedule_seed))
    identities, scripts = [], []
    for video, segments, video_seed in zip(videos, schedule, video_seeds, strict=True):
        generator = np.random.default_rng(video_seed)
        identities.append(sample_identity(generator))
        scripts.append(write_script(identities[-1], video.num_frames, segments, generator))
    annotator = np.random.default_rng(annotator_seed)
    truths = [_true_labels(script, video.num_rows) for script, video in zip(scripts, videos, strict=True)]
    expressions = annotate_expressions(
        [truth["expr8"] for truth in truths], plan.wrong_share, plan.unlabelled_share, annotator
    )
    return [
        ComposedVideo(
            plan=video,
            identity=identity,
            script=script,
            truth=truth,
            given={} if video.split == "test" else _given_labels(truth, labels, plan.unlabelled_share, annotator),
            face_found=_find_faces(video.num_images, plan.missing_share, annotator),
            drawing_seed=video_seed.spawn(1)[0],
        )
        for video, identity, script, truth, labels, video_seed in zip(
            videos, identities, scripts, truths, expressions, video_seeds, strict=True
        )
    ]


def _true_labels(script: VideoScript, num_rows: int) -> dict[TaskName, Labels]:
    action_units = script.action_units[:num_rows]
    return {
        "expr8": script.expression[:num_rows],
        "va": affect_of(action_units),
        "au": present_units(action_units),
    }


def _given_labels(
    truth: dict[TaskName, Labels], expression: Labels, unlabelled_share: float, annotator: np.random.Generator
) -> dict[TaskName, Labels]:
    """Valence, arousal and action units are given as they are, but for spans that are not annotated."""
    affect, units = truth["va"].copy(), truth["au"].copy()
    affect[unannotated(len(affect), unlabelled_share, annotator)] = np.nan
    units[unannotated(len(units), unlabelled_share, annotator)] = IGNORE_LABEL
    return {"expr8": expression, "va": affect, "au": units}


def _find_faces(num_images: int, missing_share: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Lose faces in short runs. The last frame keeps its own: the last image is what tells a video's length."""
    found = np.ones(num_images, dtype=bool)
    wanted = round(missing_share * num_images)
    while (lacking := wanted - int((~found).sum())) > 0:
        length = min(int(generator.integers(2, 10)), lacking)
        start = int(generator.integers(0, num_images - length))
        found[start : start + length] = False
    return found


def write_annotations(root: Path, videos: Sequence[ComposedVideo]) -> None:
    """Write annotations, truth, test lists and templates below `root`, and make the folders of the crops."""
    for video in videos:
        plan = video.plan
        _crop_dir(root, plan).mkdir(parents=True, exist_ok=True)
        for name, labels in video.given.items():
            write_annotation(_label_path(root / "annotations", plan, name), labels, TASKS[name])
        for name, labels in video.truth.items():
            write_annotation(_label_path(root / "truth", plan, name), labels, TASKS[name])
    test = [video.plan for video in videos if video.plan.split == "test"]
    for name, (list_name, template_name, row) in _TEST_FILES.items():
        names = "".join(f"{plan.video_id}\n" for plan in test)
        write_text(root / _LISTS_DIR / f"{list_name}_Challenge_test_set_release.txt", names)
        rows = [f"{plan.video_id}/{image_name(index)},{row}" for plan in test for index in range(plan.num_rows)]
        template = "\n".join((TASKS[name].template_header, *rows)) + "\n"
        write_text(root / _TEMPLATES_DIR / f"CVPR_6th_ABAW_{template_name}_test_set_example.txt", template)


def _label_path(tree: Path, plan: VideoPlan, task: TaskName) -> Path:
    folder = SPLIT_DIRS.get(plan.split, TEST_DIR)
    return tree / TASKS[task].annotation_dirs[0] / folder / f"{plan.video_id}.txt"


def _crop_dir(root: Path, plan: VideoPlan) -> Path:
    return root / "crops" / plan.crop_folder / plan.video_id


def draw_videos(
    root: Path, videos: Sequence[ComposedVideo], quality: int, workers: int, advance: Callable[[int], None]
) -> None:
    """Draw the crops of all videos in `workers` processes; `advance` is called with the frames of each that is done."""
    if workers == 1:
        for video in videos:
            advance(draw_video(_crop_dir(root, video.plan), video, quality))
        return
    # Forking a process that has threads, as torch has, can hang; a spawned one starts clean.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        drawn = [pool.submit(draw_video, _crop_dir(root, video.plan), video, quality) for video in videos]
        try:
            for future in as_completed(drawn):
                advance(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def draw_video(crop_dir: Path, video: ComposedVideo, quality: int) -> int:
    """Draw one video's crops into its folder, one JPEG for each frame with a face; returns the number of frames."""
    generator = np.random.default_rng(video.drawing_seed)
    background = sample_background(generator)
    noise = sample_noise(generator, generator.uniform(2.0, 6.0))
    corners = generator.integers(0, CROP_PX, (video.plan.num_images, 2), endpoint=True).tolist()
    script = video.script
    for index in np.flatnonzero(video.face_found).tolist():
        hand = Hand(*script.hand[index].tolist())
        face = draw_face(
            video.identity,
            script.action_units[index],
            pose=tuple(script.pose[index].tolist()),
            gaze=tuple(script.gaze[index].tolist()),
            blink=float(script.blink[index]),
            hand=hand if hand.half_width else None,
            background=background,
        )
        picture = take_picture(face, Exposure(*script.exposure[index].tolist()), noise, tuple(corners[index]))
        (crop_dir / image_name(index)).write_bytes(encode_picture(picture, quality))
    return video.plan.num_images


def measure(videos: Sequence[ComposedVideo]) -> list[str]:
    """What the labels turned out to be, a line each: wrong, unlabelled and missing shares, and classes by split."""
    lines = []
    for split in SPLITS:
        chosen = [video for video in videos if video.plan.split == split]
        truth = np.concatenate([video.truth["expr8"] for video in chosen])
        found = np.concatenate([video.face_found for video in chosen])
        counts = np.bincount(truth, minlength=len(EXPRESSIONS)) / len(truth)
        shares = ", ".join(f"{name} {share:.1%}" for name, share in zip(EXPRESSIONS, counts, strict=True))
        lines.append(f"{split}: {len(chosen)} videos, {len(truth)} frames, {(~found).mean():.1%} without a face")
        lines.append(f"{split}, true classes: {shares}")
        if split != "test":
            given = np.concatenate([video.given["expr8"] for video in chosen])
            labelled = given != IGNORE_LABEL
            wrong = (given != truth)[labelled].mean()
            lines.append(f"{split}, given labels: {wrong:.1%} wrong, {1 - labelled.mean():.1%} of frames unlabelled")
    return lines


def _read_record(root: Path) -> dict[str, Any]:
    """The record of an earlier rendering, complete or not; empty if there is none that can be read."""
    try:
        record = json.loads((root / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _count_files(root: Path) -> int:
    return sum(len(files) for part in _PARTS for _, _, files in os.walk(root / part))


def _clear(root: Path, record: dict[str, Any]) -> None:
    """Remove what an earlier rendering left, and nothing that anyone else put there."""
    present = [part for part in _PARTS if (root / part).exists()]
    if present and "made_by" not in record:
        raise DataError(
            f"{root} already holds {', '.join(present)}, which were not rendered (there is no {RECORD_NAME}). "
            "Give another folder, or remove them yourself."
        )
    for part in present:
        shutil.rmtree(root / part)
