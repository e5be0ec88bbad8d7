"""Manifests: built from the challenge's layouts, checked with every problem named, and split into folds."""

import re
from pathlib import Path

import av
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vnaw_pipeline.annotations import image_name
from vnaw_pipeline.checks import check_manifest
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.folds import assign_folds, fold_split
from vnaw_pipeline.layouts import crop_set_of, source_video_of
from vnaw_pipeline.manifests import COLUMNS, build_manifest, read_labels, read_manifest, write_manifest
from vnaw_pipeline.tasks import TASKS

EXPR = TASKS["expr8"]
HEADER = ",".join(EXPR.header)


class Tree:
    """A small challenge tree: empty image files, annotations, lists."""

    def __init__(self, root: Path) -> None:
        self.annotations = root / "annotations"
        self.crops = root / "crops"
        self.crops.mkdir()
        self.root = root

    def annotate(self, video_id: str, labels: list[int], split: str = "Train_Set") -> Path:
        return self.annotate_text(video_id, "\n".join([HEADER, *map(str, labels)]).encode() + b"\n", split)

    def annotate_text(self, video_id: str, content: bytes, split: str = "Train_Set") -> Path:
        path = self.annotations / "EXPR_Recognition_Challenge" / split / f"{video_id}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def crop(self, video_id: str, frames: int, crop_set: str = "cropped_aligned") -> Path:
        folder = self.crops / crop_set / video_id
        folder.mkdir(parents=True)
        for frame_index in range(frames):
            (folder / image_name(frame_index)).touch()
        return folder

    def video(self, video_id: str, labels: list[int], split: str = "Train_Set") -> None:
        self.annotate(video_id, labels, split)
        self.crop(video_id, len(labels))

    def build(self, **options) -> pd.DataFrame:
        return build_manifest(self.annotations, self.crops, EXPR, **options)

    def check(self, manifest: Path | pd.DataFrame | None = None, **options) -> list[str]:
        """Problems as text, paths relative to the tree."""
        found = check_manifest(
            self.build() if manifest is None else manifest, self.annotations, self.crops, EXPR, **options
        )
        return [str(problem).replace(f"{self.root}/", "") for problem in found]


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    tree.video("1-30-1280x720", [0, 1, 2])
    tree.video("video86_1", [4, 4], "Validation_Set")
    return tree


@pytest.fixture
def test_list(tree):
    tree.crop("t1", 4)
    path = tree.root / "list.txt"
    path.write_text("t1\n")
    return path


def record_video(path: Path, frames: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p")
        for _ in range(frames):
            image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


def template_of(path: Path, frames: dict[str, int]) -> Path:
    lines = [f"{video}/{image_name(k)},0" for video, count in frames.items() for k in range(count)]
    path.write_text("\n".join([EXPR.template_header, *lines, ""]))
    return path


# Building


def test_the_official_layout(tree, test_list):
    tree.annotate("10-60_left", [0, 7])
    tree.crop("10-60_left", 2, "batch2/cropped_aligned_new_50_vids")
    manifest = tree.build(test_list=test_list)
    folder = "EXPR_Recognition_Challenge"
    assert list(manifest.columns) == list(COLUMNS)
    assert manifest.to_numpy().tolist() == [
        ["1-30-1280x720", "train", 3, "cropped_aligned/1-30-1280x720", f"{folder}/Train_Set/1-30-1280x720.txt", "",
         "1-30-1280x720"],
        ["10-60_left", "train", 2, "batch2/cropped_aligned_new_50_vids/10-60_left",
         f"{folder}/Train_Set/10-60_left.txt", "", "10-60"],
        ["video86_1", "validation", 2, "cropped_aligned/video86_1", f"{folder}/Validation_Set/video86_1.txt", "",
         "video86_1"],
        ["t1", "test", 4, "cropped_aligned/t1", "", "", "t1"],
    ]  # fmt: skip


def test_older_folder_name_and_the_folder_itself_are_found(tree):
    found = tree.build()
    folder = tree.annotations / "EXPR_Recognition_Challenge"
    inner = build_manifest(folder, tree.crops, EXPR)
    assert inner["annotation"].tolist() == ["Train_Set/1-30-1280x720.txt", "Validation_Set/video86_1.txt"]
    folder.rename(tree.annotations / "EXPR_Classification_Challenge")
    assert tree.build()["num_frames"].tolist() == found["num_frames"].tolist()
    with pytest.raises(DataError, match="needs one folder VA_Estimation_Challenge"):
        build_manifest(tree.annotations, tree.crops, TASKS["va"])


def test_own_recordings_need_no_annotations(tmp_path):
    tree = Tree(tmp_path)
    tree.crop("holiday", 3, ".")
    (tree.crops / "nobody").mkdir()
    tree.crop("short", 3, ".")
    (tree.crops / "detections").mkdir()
    (tree.crops / "detections" / "short.csv").write_text("frame_index,valid\n" + "0,1\n" * 5)
    with h5py.File(tree.crops / "party.h5", "w") as pack:
        pack.attrs["num_frames"] = 9
    manifest = build_manifest(None, tree.crops, EXPR)
    assert manifest[["video_id", "split", "num_frames", "crops"]].to_numpy().tolist() == [
        ["holiday", "test", 3, "holiday"],
        ["party", "test", 9, "party.h5"],
        ["short", "test", 5, "short"],  # its last two frames had no face
    ]
    assert check_manifest(manifest, None, tree.crops, EXPR) == []
    assert len(check_manifest(manifest.assign(num_frames=7), None, tree.crops, EXPR)) == 3


def test_a_manifest_for_imported_embeddings_needs_no_crops(tree: Tree) -> None:
    manifest = build_manifest(tree.annotations, None, EXPR)
    assert manifest[["video_id", "num_frames", "crops"]].to_numpy().tolist() == [
        ["1-30-1280x720", 3, ""],
        ["video86_1", 2, ""],
    ]
    assert all(problem.severity == "warning" for problem in check_manifest(manifest, tree.annotations, None, EXPR))
    of_crops = check_manifest(manifest, tree.annotations, tree.crops, EXPR)
    assert sum(problem.severity == "error" for problem in of_crops) == 2, "here crops are said to be there"
    with pytest.raises(DataError, match="nothing to make a manifest of"):
        build_manifest(None, None, EXPR)


def test_test_length_is_the_templates_then_the_videos_then_the_last_crops(tree, test_list):
    videos = tree.root / "videos" / "batch1"
    videos.mkdir(parents=True)
    record_video(videos / "t1.mp4", 6)
    template = template_of(tree.root / "template.txt", {"t1": 5, "t2_right": 1})

    def length(**options):
        return tree.build(**options).set_index("video_id")["num_frames"]["t1"]

    assert length(test_list=test_list) == 4
    assert length(test_list=test_list, videos_dir=videos.parent) == 6
    assert length(template=template, videos_dir=videos.parent) == 5
    assert tree.build(template=template)["video_id"].tolist()[-2:] == ["t1", "t2_right"]


def test_a_manifest_mixes_crop_sets_no_more_than_it_must(tree):
    tree.crop("1-30-1280x720", 3, "a_set")
    manifest = tree.build()
    assert set(manifest["crops"].map(crop_set_of)) == {"cropped_aligned"}
    assert tree.check(manifest) == [
        "warning: manifest: no video is in the split test",
        "warning: manifest:2: video 1-30-1280x720: crops lie at a_set/1-30-1280x720 too; "
        "the manifest uses cropped_aligned/1-30-1280x720",
    ]
    tree.crop("video86_1", 2, "batch1/cropped_aligned_new_50_vids")  # the other half of the same set
    assert len(tree.check(manifest)) == 2


def test_names_of_persons():
    assert source_video_of("10-60-1280x720_right") == "10-60-1280x720"
    assert source_video_of("video86_1") == "video86_1"
    assert crop_set_of("batch1/cropped_aligned/v") == crop_set_of("cropped_aligned_new_50_vids/v") == "cropped_aligned"


# The file


def test_reading_gives_what_was_written(tree, test_list):
    path = tree.root / "deep" / "manifest.csv"
    manifest = tree.build(test_list=test_list)
    write_manifest(manifest, path)
    assert b"\r" not in path.read_bytes()
    pd.testing.assert_frame_equal(read_manifest(path), manifest)


def test_every_problem_of_a_manifest_is_listed(tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_bytes(
        ",".join(COLUMNS).encode()
        + b"\na,train,10,c/a,a.txt,0,a"
        + b"\nb,training,0,c/b,b.txt,,b"
        + b"\na,test,x,/c/a,,,a"
        + b"\nc,train,3"
        + b"\n\xff,validation,3,c,,1;2,"
        + b"\n../d,test,5,..,,,d\n"
    )
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    lines = str(caught.value).splitlines()
    assert [int(re.match(rf"{re.escape(str(path))}:(\d+): ", line)[1]) for line in lines] == [
        *(3, 3), *(4, 4, 4), 5, *(6, 6, 6), *(7, 7)
    ]  # fmt: skip
    for expected in ("split 'training'", "num_frames '0'", "already in line 2", "num_frames 'x'", "3 columns",
                     "byte 0xff", "fold '1;2'", "no source_video", "not a file name"):  # fmt: skip
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("video,split\n", r":1: the header is 'video,split'; expected 'video_id,split"),
        (",".join(COLUMNS) + "\n", "no video"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_that_are_no_manifest(tmp_path, content, message):
    path = tmp_path / "manifest.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_manifest(path)


def test_labels_are_read_at_the_manifests_length(tree, test_list):
    manifest = tree.build(test_list=test_list)
    labels = read_labels(manifest, tree.annotations, EXPR)
    assert {video: found.tolist() for video, found in labels.items()} == {
        "1-30-1280x720": [0, 1, 2],
        "video86_1": [4, 4],
    }
    tree.annotate_text("video86_1", b"oops\n9\n", "Validation_Set")
    with pytest.raises(DataError) as caught:
        read_labels(manifest.assign(num_frames=5), tree.annotations, EXPR)
    assert "3 rows; the manifest says 5 frames" in str(caught.value)
    assert "video86_1.txt:2: bad value '9'" in str(caught.value)


# The check


def test_a_sound_tree_has_no_problems(tree, test_list):
    path = tree.root / "manifest.csv"
    write_manifest(tree.build(test_list=test_list), path)
    assert tree.check(path) == []


def test_all_problems_of_a_broken_tree_are_listed_at_once(tree, test_list):
    tree.annotate("early", [0] * 9)
    tree.crop("early", 6)
    tree.annotate("one_early", [0] * 9)
    tree.crop("one_early", 8)
    tree.annotate("late", [0] * 4)
    tree.crop("late", 7)
    tree.video("pair_left", [1, 1])
    tree.video("pair_right", [1, 1], "Validation_Set")
    tree.annotate("nocrops", [5])
    tree.annotate_text("empty", b"")
    tree.crop("empty", 1)
    tree.annotate_text("header", b"Neutral\n0\n")
    tree.crop("header", 1)
    tree.annotate_text("values", (HEADER + "\n0\n9\n0,0\n").encode() + b"\xfe\n")
    tree.crop("values", 4)
    tree.video("Case", [0])
    tree.video("case", [0])
    odd = tree.crop("odd", 1)
    tree.annotate("odd", [0])
    (odd / "1.jpg").touch()
    (odd / ".DS_Store").touch()
    path = tree.root / "manifest.csv"
    write_manifest(tree.build(test_list=test_list), path)
    with path.open("a") as file:
        file.write("t1,test,4,cropped_aligned/t1,,,t1\n")
    (tree.crops / "cropped_aligned" / "t1").rename(tree.crops / "cropped_aligned" / "moved")
    tree.annotate("new", [0])
    train = "annotations/EXPR_Recognition_Challenge/Train_Set"
    found = tree.check(path)
    expected = [
        f"error: {train}/empty.txt: the file is empty",
        f"error: {train}/header.txt:1: the header is 'Neutral'",
        f"error: {train}/values.txt:3: bad value '9'",
        f"error: {train}/values.txt:4: 2 columns in '0,0'",
        f"error: {train}/values.txt:5: byte 0xfe",
        r"error: manifest.csv:\d+: video t1 is already in line",
        r"error: manifest.csv:\d+: video pair_right: is in validation, but pair_left of the same recording is in train",
        r"error: manifest.csv:\d+: video nocrops: no crops below crops, neither",
        r"error: manifest.csv:\d+: video t1: its crops folder crops/cropped_aligned/t1 does not exist",
        r"error: manifest.csv:\d+: video early: 9 annotation rows, but .* end at frame 6: the last 3 frames may have "
        r"no face; .*--videos",
        r"warning: manifest.csv:\d+: video one_early: 9 annotation rows, .* the last frame may have no face",
        r"error: manifest.csv:\d+: video late: 4 annotation rows, but .* go on to frame 7",
        r"warning: manifest.csv:\d+: video case: differs from Case",
        r"warning: crops/cropped_aligned/odd: 1 file\(s\) not named like 00001.jpg are not used: 1.jpg",
        f"warning: {train}/new.txt: no row of the manifest uses",
    ]
    for pattern in expected:
        matching = [problem for problem in found if re.match(pattern, problem)]
        assert matching, f"{pattern} is not among:\n" + "\n".join(found)
        found = [problem for problem in found if problem not in matching]
    assert found == []


def test_a_video_under_both_splits_is_found(tree, test_list):
    tree.annotate("video86_1", [4, 4], "Train_Set")
    problems = tree.check(tree.build(test_list=test_list))
    assert [problem for problem in problems if "is in validation, but video86_1 of the same recording" in problem]
    assert [problem for problem in problems if "already in line" in problem]


@pytest.mark.parametrize(
    ("frames", "severity"), [(4, "error"), (5, "warning"), (7, None), (8, "warning"), (9, "warning"), (10, "error")]
)
def test_the_video_decides_on_the_length(tree, test_list, frames, severity):
    tree.annotate("clip", [0] * 7)
    tree.crop("clip", 4)
    videos = tree.root / "videos"
    videos.mkdir()
    record_video(videos / "clip.mp4", frames)
    manifest = tree.build(test_list=test_list)
    found = [problem for problem in tree.check(manifest, videos_dir=videos) if "video clip" in problem]
    assert [problem.split(":")[0] for problem in found] == ([severity] if severity else [])


def test_a_pack_knows_its_videos_length(tree, test_list):
    tree.annotate("clip", [0] * 7)
    with h5py.File(tree.crops / "clip.h5", "w") as pack:
        pack.attrs["num_frames"] = 4
    (tree.crops / "t2.h5").write_text("no pack")
    test_list.write_text("t1\nt2\n")
    found = tree.check(tree.build(test_list=test_list))
    assert any("video clip: 7 annotation rows, but its pack crops/clip.h5 has 4 frames" in problem for problem in found)
    assert any(problem.startswith("error: crops/t2.h5: ") and "not a crop pack" in problem for problem in found)


def test_a_file_that_is_no_video_is_named(tree, test_list):
    videos = tree.root / "videos"
    videos.mkdir()
    (videos / "t1.mp4").write_text("text")
    manifest = tree.build(test_list=test_list, videos_dir=videos)
    found = tree.check(manifest, videos_dir=videos)
    assert any("videos/t1.mp4 cannot be opened as a video" in problem for problem in found)
    assert any("no video video86_1 in" in problem for problem in found)


def test_the_template_is_compared_with_the_test_rows(tree, test_list):
    test_list.write_text("t1\nt3\n")
    tree.crop("t3", 1)
    template = template_of(tree.root / "template.txt", {"t1": 6, "t2": 1})
    found = tree.check(tree.build(test_list=test_list), template=template)
    assert len(found) == 3
    assert any("video t1: num_frames is 4, but the template" in problem for problem in found)
    assert any("asks for video t2" in problem for problem in found)
    assert any("video t3: the template" in problem for problem in found)


def test_changed_annotations_and_missing_roots_are_found(tree, test_list):
    manifest = tree.build(test_list=test_list)
    tree.annotate("video86_1", [4] * 9, "Validation_Set")
    assert any("num_frames is 2, but" in problem and "has 9 rows" in problem for problem in tree.check(manifest))
    found = check_manifest(manifest, tree.root / "none", tree.root / "nocrops", EXPR, videos_dir=tree.root / "no")
    assert {str(problem.path.relative_to(tree.root)) for problem in found if problem.path != Path("manifest")} >= {
        "none",
        "nocrops",
        "no",
    }


# Folds


def aff_wild2_like(videos: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Source videos (every ninth with a second person) and class frames with long tails in length and class."""
    generator = np.random.default_rng(seed)
    shares = np.array([0.30, 0.03, 0.02, 0.02, 0.16, 0.13, 0.05, 0.29])
    lengths = np.clip(generator.lognormal(np.log(3000), 1, videos), 73, 40_000)
    frames = (lengths[:, None] * generator.dirichlet(shares * 4, videos)).astype(np.int64)
    return [f"v{index - (index % 9 == 8)}" for index in range(videos)], frames


def test_folds_are_seven_to_three_with_every_class_and_no_shared_recording():
    sources, frames = aff_wild2_like(318, seed=0)
    folds = assign_folds(sources, frames, 3, seed=0)
    assert set(folds) == {"", "0", "1", "2"}  # three folds share no validation video
    by_source = pd.Series(folds).groupby(sources).nunique()
    assert (by_source == 1).all()
    for fold in "012":
        in_validation = np.array([fold in assigned for assigned in folds])
        assert 0.28 < in_validation.mean() < 0.32
        assert 0.25 < frames[in_validation].sum() / frames.sum() < 0.35
        assert (frames[in_validation].sum(axis=0) > 0).all()
        assert (frames[~in_validation].sum(axis=0) > 0).all()


@pytest.mark.parametrize("recordings", range(3, 11))
def test_three_folds_share_no_video_however_few_recordings_there_are(recordings):
    sources = [f"v{index}" for index in range(recordings)]
    folds = assign_folds(sources, np.ones((recordings, 8), np.int64), 3, seed=0)
    assert set(folds) <= {"", "0", "1", "2"}


def test_more_folds_overlap():
    sources, frames = aff_wild2_like(60, seed=1)
    folds = assign_folds(sources, frames, 10, seed=0)
    assert all(len(assigned.split()) == 3 for assigned in folds)
    with pytest.raises(DataError, match="1 to 10"):
        assign_folds(sources, frames, 11, seed=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 1000))
def test_folds_hold_for_any_data(videos, seed):
    sources, frames = aff_wild2_like(videos, seed)
    frames[:: videos // 2 + 1] = 0  # videos without a label are placed too
    folds = assign_folds(sources, frames, 2, seed)
    assert folds == assign_folds(sources, frames, 2, seed)
    assert all(pd.Series(folds, dtype=object).groupby(sources).nunique() == 1)
    for fold in "01":
        in_validation = sum(fold in assigned for assigned in folds)
        assert 0 < in_validation < videos


def test_folds_need_annotations(tree):
    tree.crop("video1", 3)
    with pytest.raises(DataError, match="Give the annotations, or no folds"):
        build_manifest(None, tree.crops, EXPR, folds=3)


def test_folds_in_a_manifest(tree, test_list):
    for index in range(10):
        tree.annotate(f"x{index}", [index % 4] * 5)
    tree.annotate_text("broken", b"oops\n")
    manifest = tree.build(test_list=test_list, folds=3, seed=5)
    assert manifest.equals(tree.build(test_list=test_list, folds=3, seed=5))
    assert not manifest.equals(tree.build(test_list=test_list, folds=3, seed=6))
    split = fold_split(manifest, 1)
    is_test = manifest["split"] == "test"
    assert split["split"][is_test].tolist() == ["test"]
    assert (split["split"][~is_test] == "validation").equals(manifest["fold"][~is_test] == "1")
    with pytest.raises(DataError, match="no fold 3; it has folds 0, 1, 2"):
        fold_split(manifest, 3)
    with pytest.raises(DataError, match="built without folds"):
        fold_split(tree.build(), 0)
