"""The rendered data set: same bytes every time, Aff-Wild2's shape, and labels whose relation to the truth is known."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from vnaw_pipeline.annotations import frame_index_of, labelled, read_annotation
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.rendering.annotators import CONFUSIONS, annotate_expressions, unannotated
from vnaw_pipeline.rendering.dataset import (
    RECORD_NAME,
    ComposedVideo,
    DatasetPlan,
    compose_videos,
    render_annotations,
    render_dataset,
)
from vnaw_pipeline.rendering.face import Hand, draw_face
from vnaw_pipeline.rendering.identity import sample_identity
from vnaw_pipeline.rendering.schedule import TRAIN_FRAMES, class_shares, schedule_expressions
from vnaw_pipeline.rendering.script import PATTERNS, affect_of, present_units
from vnaw_pipeline.tasks import ACTION_UNITS, EXPRESSIONS, IGNORE_LABEL, TASKS

TINY = DatasetPlan(train_videos=4, validation_videos=2, test_videos=1, frames=(60, 70), short_frames=40)
PERSON = sample_identity(np.random.default_rng(3))


def digests(root: Path) -> dict[str, str]:
    """Digest of every file below a root by its relative path."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def units(**intensities: float) -> np.ndarray:
    return np.array([intensities.get(name, 0.0) for name in ACTION_UNITS])


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rendered") / "tiny"
    render_dataset(root, TINY, seed=5, workers=1, shown=False)
    return root


@pytest.fixture(scope="module")
def demo_videos() -> list[ComposedVideo]:
    return compose_videos(DatasetPlan(), seed=0)


def of_split(videos: list[ComposedVideo], split: str) -> list[ComposedVideo]:
    return [video for video in videos if video.plan.split == split]


# Drawing


@pytest.mark.parametrize("name", ACTION_UNITS)
def test_every_action_unit_moves_the_face(name: str) -> None:
    rest, moved = draw_face(PERSON, units()).astype(int), draw_face(PERSON, units(**{name: 1.0})).astype(int)
    changed = (np.abs(moved - rest).max(axis=2) > 20).sum()
    assert changed >= 40, f"{name} changes {changed} pixels"


def test_brow_units_move_the_upper_half_and_mouth_units_the_lower() -> None:
    rest = draw_face(PERSON, units()).astype(int)
    for name, expected_half in {
        "AU1": "upper",
        "AU2": "upper",
        "AU4": "upper",
        "AU12": "lower",
        "AU26": "lower",
    }.items():
        change = np.abs(draw_face(PERSON, units(**{name: 1.0})).astype(int) - rest).sum(axis=(1, 2))
        half = "upper" if change[:60].sum() > change[60:].sum() else "lower"
        assert half == expected_half, name


def test_pose_gaze_blink_and_hand_are_drawn() -> None:
    rest = draw_face(PERSON, units())
    variants = [
        draw_face(PERSON, units(), pose=(0.4, 0.0, 0.0)),
        draw_face(PERSON, units(), pose=(-0.4, 0.0, 0.0)),
        draw_face(PERSON, units(), pose=(0.0, 0.3, 0.0)),
        draw_face(PERSON, units(), pose=(0.0, 0.0, 0.2)),
        draw_face(PERSON, units(), gaze=(1.0, 0.0)),
        draw_face(PERSON, units(), blink=1.0),
        draw_face(PERSON, units(), hand=Hand(56.0, 80.0, 16.0, 0.3)),
    ]
    pictures = {picture.tobytes() for picture in [rest, *variants]}
    assert len(pictures) == len(variants) + 1
    assert all(picture.shape == (112, 112, 3) and picture.dtype == np.uint8 for picture in variants)


def test_a_face_detector_takes_drawn_faces_for_faces() -> None:
    import retinaface

    canvas = np.full((240, 320, 3), 128, np.uint8)
    for seed in range(4):
        canvas[60:172, 100:212] = draw_face(sample_identity(np.random.default_rng(seed)), units())
        assert len(retinaface.detect_faces(canvas, score_threshold=0.9)) == 1, seed


# What is true


def test_affect_follows_the_written_formula() -> None:
    """Valence and arousal of a full smile and of a full scowl, summed by hand."""
    expected = np.tanh([[0.50 + 1.10, -0.10 + 0.25 + 0.25], [-0.55 - 0.10 - 0.35, -0.10 + 0.35 + 0.30 + 0.45]])
    drawn = np.stack([units(AU6=1.0, AU12=1.0), units(AU4=1.0, AU7=1.0, AU23=1.0)])
    np.testing.assert_allclose(affect_of(drawn), expected, atol=5.1e-4)  # rounded to three decimals


@given(st.lists(st.floats(0, 1), min_size=12, max_size=12))
def test_affect_and_units_stay_in_range(intensities: list[float]) -> None:
    drawn = np.array([intensities])
    assert (np.abs(affect_of(drawn)) <= 1).all()
    assert ((present_units(drawn) == 1) == (drawn >= 0.3)).all()


def test_patterns_name_known_units_and_every_expression_but_neutral() -> None:
    assert set(PATTERNS) == set(EXPRESSIONS) - {"Neutral"}
    assert {name for variants in PATTERNS.values() for variant in variants for name in variant} <= set(ACTION_UNITS)


def test_truth_is_that_of_what_is_drawn(demo_videos: list[ComposedVideo]) -> None:
    for video in demo_videos:
        drawn = video.script.action_units[: video.plan.num_rows]
        np.testing.assert_array_equal(video.truth["va"], affect_of(drawn))
        np.testing.assert_array_equal(video.truth["au"], present_units(drawn))


def test_expressions_show_in_valence(demo_videos: list[ComposedVideo]) -> None:
    expression = np.concatenate([video.truth["expr8"] for video in demo_videos])
    valence = np.concatenate([video.truth["va"][:, 0] for video in demo_videos])
    means = {name: valence[expression == index].mean() for index, name in enumerate(EXPRESSIONS)}
    assert means["Happiness"] > 0.3 > means["Neutral"] > -0.1
    assert max(means[name] for name in ("Anger", "Disgust", "Sadness")) < -0.2


# Schedule


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(40, 600), min_size=2, max_size=20), st.integers(0, 2**32 - 1))
def test_schedule_stays_in_its_videos_and_does_not_overlap(lengths: list[int], seed: int) -> None:
    schedule = schedule_expressions(lengths, np.random.default_rng(seed))
    for length, segments in zip(lengths, schedule, strict=True):
        edges = [edge for segment in segments for edge in (segment.start, segment.stop)]
        assert edges == sorted(edges)
        assert all(segment.start < segment.stop for segment in segments)
        assert not edges or (edges[0] >= 0 and edges[-1] <= length)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_classes_have_aff_wild2_shares_and_at_least_two_videos(demo_videos: list[ComposedVideo], split: str) -> None:
    truths = [video.truth["expr8"] for video in of_split(demo_videos, split)]
    measured = np.bincount(np.concatenate(truths), minlength=8) / sum(map(len, truths))
    np.testing.assert_allclose(measured, class_shares(), atol=0.01)
    np.testing.assert_allclose(measured, np.array(TRAIN_FRAMES) / sum(TRAIN_FRAMES), atol=0.025)
    for expression in range(8):
        assert sum((truth == expression).any() for truth in truths) >= 2, EXPRESSIONS[expression]


# Annotators


def test_confusions_are_shares_of_other_classes() -> None:
    assert set(CONFUSIONS) == set(EXPRESSIONS)
    for name, rivals in CONFUSIONS.items():
        assert name not in rivals
        assert set(rivals) <= set(EXPRESSIONS)
        assert sum(rivals.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_about_a_third_of_the_given_labels_is_wrong(demo_videos: list[ComposedVideo], split: str) -> None:
    videos = of_split(demo_videos, split)
    truth = np.concatenate([video.truth["expr8"] for video in videos])
    labels = np.concatenate([video.given["expr8"] for video in videos])
    is_labelled = labels != IGNORE_LABEL
    assert (labels != truth)[is_labelled].mean() == pytest.approx(0.35, abs=0.03)
    assert is_labelled.mean() == pytest.approx(0.90, abs=0.01)
    for expression in range(8):
        shown = Counter(labels[is_labelled & (truth == expression)].tolist())
        assert shown.most_common(1)[0][0] == expression, EXPRESSIONS[expression]
        given_as = Counter(truth[is_labelled & (labels == expression)].tolist())
        assert given_as.most_common(1)[0][0] == expression, EXPRESSIONS[expression]


def test_wrong_labels_come_in_spans(demo_videos: list[ComposedVideo]) -> None:
    """Single wrong frames would be smoothed away by any model that looks at neighbours."""
    lengths = []
    for video in of_split(demo_videos, "train"):
        wrong = np.concatenate([[0], video.truth["expr8"] != video.given["expr8"], [0]]).astype(int)
        lengths += (np.flatnonzero(np.diff(wrong) == -1) - np.flatnonzero(np.diff(wrong) == 1)).tolist()
    assert np.median(lengths) >= 5


def test_annotators_who_never_err_give_the_truth_but_for_boundaries() -> None:
    truth = np.repeat([0, 4, 0, 5], 100)
    (labels,) = annotate_expressions([truth], 0.0, 0.0, np.random.default_rng(0))
    wrong = np.flatnonzero(labels != truth)
    assert len(wrong) < 60
    assert all(min(abs(frame - boundary) for boundary in (100, 200, 300)) <= 20 for frame in wrong)


@given(st.integers(1, 700), st.floats(0, 0.99), st.integers(0, 1000))
def test_unannotated_share_is_exact(num_frames: int, share: float, seed: int) -> None:
    assert unannotated(num_frames, share, np.random.default_rng(seed)).sum() == round(share * num_frames)


def test_other_tasks_are_given_as_they_are_where_annotated(demo_videos: list[ComposedVideo]) -> None:
    for video in demo_videos:
        for task in video.given.keys() - {"expr8"}:
            known = labelled(video.given[task])
            np.testing.assert_array_equal(video.given[task][known], video.truth[task][known])
            assert (~known).mean() == pytest.approx(0.1, abs=0.01)


# Shape of the data set


def test_oddities_of_the_real_data_are_there(demo_videos: list[ComposedVideo]) -> None:
    plans = [video.plan for video in demo_videos]
    assert len({plan.video_id for plan in plans}) == len(plans)
    left, right = (plan for plan in plans if plan.video_id.endswith(("_left", "_right")))
    assert left.video_id.removesuffix("_left") == right.video_id.removesuffix("_right")
    assert (left.split, left.num_images) == (right.split, right.num_images)
    assert min(plan.num_rows for plan in plans) < 100
    assert {plan.num_rows - plan.num_images for plan in plans if plan.split == "train"} == {-1, 0, 1}
    assert {plan.crop_folder for plan in plans} == {"cropped_aligned", "cropped_aligned_new_50_vids"}
    assert 16_000 <= sum(plan.num_images for plan in plans) <= 18_000


def test_people_differ(demo_videos: list[ComposedVideo]) -> None:
    faces = {draw_face(video.identity, units()).tobytes() for video in demo_videos}
    assert len(faces) == len(demo_videos)


def test_missing_faces_come_in_runs(demo_videos: list[ComposedVideo]) -> None:
    found = [video.face_found for video in demo_videos]
    missing = sum(int((~frames).sum()) for frames in found)
    runs = sum(int((np.diff(frames.astype(int)) == -1).sum() + (not frames[0])) for frames in found)
    assert missing / sum(map(len, found)) == pytest.approx(0.02, abs=0.003)
    assert missing / runs >= 2
    assert all(frames[-1] for frames in found)


def test_the_tree_on_disk_is_what_was_composed(tiny_root: Path) -> None:
    for video in compose_videos(TINY, seed=5):
        plan = video.plan
        crops = sorted((tiny_root / "crops" / plan.crop_folder / plan.video_id).iterdir())
        assert [frame_index_of(path.name) for path in crops] == np.flatnonzero(video.face_found).tolist()
        assert simplejpeg.decode_jpeg(crops[0].read_bytes()).shape == (112, 112, 3)
        folder = {"train": "Train_Set", "validation": "Validation_Set", "test": "Test_Set"}[plan.split]
        for tree, by_task in (("annotations", video.given), ("truth", video.truth)):
            for task, labels in by_task.items():
                path = tiny_root / tree / TASKS[task].annotation_dirs[0] / folder / f"{plan.video_id}.txt"
                np.testing.assert_array_equal(read_annotation(path, TASKS[task]), labels)
    assert not list((tiny_root / "annotations").rglob("Test_Set"))


@pytest.mark.parametrize(
    ("template", "task", "row"),
    [("Expr", "expr8", "0"), ("VA", "va", "0.5,-0.5"), ("AU", "au", "0,0,0,0,0,0,0,0,0,0,0,0")],
)
def test_templates_list_every_frame_of_the_test_videos(tiny_root: Path, template: str, task: str, row: str) -> None:
    (plan,) = (video.plan for video in compose_videos(TINY, seed=5) if video.plan.split == "test")
    path = tiny_root / "test_set_examples" / f"CVPR_6th_ABAW_{template}_test_set_example.txt"
    header, *rows = path.read_text().splitlines()
    assert header == TASKS[task].template_header
    assert rows == [f"{plan.video_id}/{frame:05d}.jpg,{row}" for frame in range(1, plan.num_images + 1)]
    lists = tiny_root / "names_of_videos_in_each_test_set"
    assert [path.read_text().split() for path in lists.iterdir()] == [[plan.video_id]] * 3


# Rendering


def test_workers_and_reruns_give_the_same_bytes(tiny_root: Path, tmp_path: Path) -> None:
    report = render_dataset(tmp_path / "again", TINY, seed=5, workers=2, shown=False)
    assert report.ok
    assert report.done == 7
    assert digests(tmp_path / "again") == digests(tiny_root)


def test_another_seed_gives_another_data_set(tiny_root: Path, tmp_path: Path) -> None:
    render_annotations(tmp_path, TINY, seed=6)
    assert digests(tmp_path / "annotations") != digests(tiny_root / "annotations")


def test_annotations_alone_are_the_same_files(tiny_root: Path, tmp_path: Path) -> None:
    render_annotations(tmp_path, TINY, seed=5)
    whole = digests(tiny_root)
    assert digests(tmp_path) == {
        name: digest for name, digest in whole.items() if not name.endswith(".jpg") and name != RECORD_NAME
    }
    folders = {path.relative_to(tmp_path) for path in (tmp_path / "crops").glob("*/*")}
    assert folders == {path.relative_to(tiny_root) for path in (tiny_root / "crops").glob("*/*")}


def test_a_complete_rendering_is_left_alone_and_an_incomplete_one_redone(tiny_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    first = render_dataset(root, TINY, seed=5, workers=1, shown=False)
    second = render_dataset(root, TINY, seed=5, workers=1, shown=False)
    assert (second.done, second.skipped, second.notes) == (0, 7, first.notes)
    record = json.loads((root / RECORD_NAME).read_text())
    (root / RECORD_NAME).write_text(json.dumps({**record, "complete": False}))  # as a kill leaves it
    next(root.rglob("00001.jpg")).write_bytes(b"half")
    assert render_dataset(root, TINY, seed=5, workers=1, shown=False).done == 7
    next(root.rglob("00001.jpg")).unlink()
    assert render_dataset(root, TINY, seed=5, workers=1, shown=False).done == 7
    assert digests(root) == digests(tiny_root)


def test_another_plan_replaces_the_rendering(tmp_path: Path) -> None:
    render_dataset(tmp_path, TINY, seed=1, workers=1, shown=False)
    render_dataset(tmp_path, TINY, seed=2, workers=1, shown=False)
    videos = {video.plan.video_id for video in compose_videos(TINY, seed=2)}
    assert {path.name for path in (tmp_path / "crops").glob("*/*")} == videos


def test_a_folder_with_other_peoples_annotations_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / "annotations" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(DataError, match="already holds annotations"):
        render_dataset(tmp_path, TINY, seed=1, workers=1, shown=False)
    assert kept.read_text() == "mine"


def test_a_root_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"Cannot render into .*file"):
        render_dataset(tmp_path / "file", TINY, seed=1, workers=1, shown=False)


@pytest.mark.parametrize(
    "wrong", [{"train_videos": 1}, {"short_frames": 300, "frames": (260, 580)}, {"wrong_share": 0.6}]
)
def test_a_plan_that_cannot_be_met_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="got DatasetPlan"):
        DatasetPlan(**wrong)
