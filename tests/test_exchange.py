"""Import and export: the same numbers on the same frames, there and back, and every unusable file is named."""

import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from vnaw_pipeline.cli import app
from vnaw_pipeline.errors import DataError, StoreError
from vnaw_pipeline.features import store as store_module
from vnaw_pipeline.features.exchange import export_features, import_features
from vnaw_pipeline.features.foreign import Layout
from vnaw_pipeline.features.store import FeatureStore, create_store, open_store
from vnaw_pipeline.locations import Location
from vnaw_pipeline.manifests import COLUMNS, write_manifest

DIM = 5
LENGTHS = {"a": 20, "b_left": 7, "faceless": 4}
VALID = {"a": [0, 1, 2, 5, 9, 16, 18], "b_left": [6], "faceless": []}


def manifest(**lengths: int) -> pd.DataFrame:
    rows = [(video_id, "test", count, "", "", "", video_id) for video_id, count in lengths.items()]
    return pd.DataFrame(rows, columns=list(COLUMNS))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a video of 20 frames has three chunks."""
    monkeypatch.setattr(store_module, "CHUNK_FRAMES", 8)


def embedding(video_id: str, frame_index: int) -> np.ndarray:
    """Of a frame, (D,) float16: any numbers that tell it from all others."""
    return np.random.default_rng([*video_id.encode(), frame_index]).standard_normal(DIM).astype(np.float16)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The frames of VALID as .npy files of every type and shape that there may be."""
    root = tmp_path / "features_mean"
    types = [np.float16, np.float32, np.float64, np.dtype(">f4")]
    for video_id, frames in VALID.items():
        (root / video_id).mkdir(parents=True)
        for frame_index in frames:
            row = embedding(video_id, frame_index).astype(types[frame_index % 4])
            np.save(root / video_id / f"{frame_index + 1:05d}.npy", row[None] if frame_index % 2 else row)
    (root / "a" / "notes.txt").write_text("not a frame")
    return root


def assert_holds_the_frames(store: FeatureStore) -> None:
    assert store.video_ids() == sorted(LENGTHS)
    for video_id, num_frames in LENGTHS.items():
        valid, embeddings = store.valid(video_id), store.embeddings(video_id)
        assert np.flatnonzero(valid).tolist() == VALID[video_id]
        assert embeddings.shape == (num_frames, DIM)
        for frame_index in range(num_frames):
            wanted = embedding(video_id, frame_index) if valid[frame_index] else np.zeros(DIM)
            assert (embeddings[frame_index] == wanted).all(), (video_id, frame_index)


def test_a_gap_in_the_numbers_is_a_frame_that_is_not_valid(tree: Path, place: Location) -> None:
    report = import_features(manifest(**LENGTHS), tree, place / "s")
    assert (report.done, report.skipped, report.frames) == (5, 0, 31)
    assert report.notes == ["8 of 31 frames are valid"]
    assert_holds_the_frames(open_store(place / "s"))
    again = import_features(manifest(**LENGTHS), tree, place / "s")
    assert (again.done, again.skipped, again.frames) == (0, 5, 0)


@pytest.mark.parametrize("layout", ["tree", "hdf5"])
def test_there_and_back_is_the_same(layout: Layout, tree: Path, place: Location, tmp_path: Path) -> None:
    import_features(manifest(**LENGTHS), tree, place / "s")
    assert export_features(place / "s", tmp_path / "out", layout).done == 3
    import_features(manifest(**LENGTHS), tmp_path / "out", place / "back")
    assert_holds_the_frames(open_store(place / "back"))
    first, back = (open_store(place / name).fingerprint for name in ("s", "back"))
    assert (first["digest"], first["imported"], back["imported"]) == (back["digest"], "tree", layout)


def test_exported_files_are_what_the_page_says(tree: Path, tmp_path: Path) -> None:
    import_features(manifest(**LENGTHS), tree, tmp_path / "s")
    export_features(tmp_path / "s", tmp_path / "tree", "tree")
    names = sorted(path.name for path in (tmp_path / "tree" / "a").iterdir())
    assert names == [f"{frame_index + 1:05d}.npy" for frame_index in VALID["a"]]
    first = np.load(tmp_path / "tree" / "a" / "00010.npy", allow_pickle=False)
    assert (first.shape, first.dtype) == ((1, DIM), np.float32)
    assert (first[0] == embedding("a", 9)).all()
    export_features(tmp_path / "s", tmp_path / "hdf5", "hdf5", manifest(b_left=7))
    assert {path.name for path in (tmp_path / "hdf5").iterdir()} == {"b_left.h5", "features.json"}
    with h5py.File(tmp_path / "hdf5" / "b_left.h5") as file:
        assert (file["embeddings"].shape, file["embeddings"].dtype) == ((7, DIM), np.float16)
        assert file["valid"][:].tolist() == [False] * 6 + [True]


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_bad_files_are_all_named_and_the_rest_is_imported(tree: Path, tmp_path: Path) -> None:
    whole, sprung = (tree / "a" / "00001.npy").read_bytes(), tmp_path / "sprung"
    bad = {
        4: (np.zeros((1, DIM + 1), np.float32), "holds (1, 6) of float32; expected (1, 5) or (5,)"),
        5: (np.zeros((1, DIM), np.int64), "(1, 5) of int64; expected"),
        7: (np.zeros((2, DIM), np.float32), "(2, 5) of float32; expected"),
        8: (np.float32(1), "() of float32; expected"),
        9: (np.full((1, DIM), np.nan, np.float32), "values that are not numbers"),
        11: (np.full(DIM, 1e6), "beyond 65504, which float16 cannot hold"),
        12: (np.array([Trap(sprung)], dtype=object), "of object; expected"),
        13: (pickle.dumps(Trap(sprung)), "cannot be read as an .npy file"),
        14: (whole[:-3], "is cut off or too long"),
        15: (b"", "cannot be read as an .npy file"),
        16: (None, "Is a directory"),
        18: (whole.replace(b"(5,)", b"((5,"), "cannot be read as an .npy file"),
    }
    for number, (content, _) in bad.items():
        path = tree / "a" / f"{number:05d}.npy"
        if content is None:
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content, allow_pickle=True)
    with pytest.raises(DataError) as caught:
        import_features(manifest(**LENGTHS), tree, tmp_path / "s")
    lines = str(caught.value).splitlines()
    for line, (number, (_, words)) in zip(lines, bad.items(), strict=False):
        assert line.startswith(str(tree / "a" / f"{number:05d}.npy"))
        assert words in line
    assert lines[len(bad) :] == ["2 of 5 chunks are written. Mend these files and run again."]
    assert not sprung.exists(), "a pickle was loaded"
    for number in bad:
        path = tree / "a" / f"{number:05d}.npy"
        path.rmdir() if path.is_dir() else path.unlink()
    assert import_features(manifest(**LENGTHS), tree, tmp_path / "s").done == 3
    assert_holds_the_frames(open_store(tmp_path / "s"))


BAD_NAMES = {
    "from 0": ("00000.npy", "numbers start at 00001, not at 0"),
    "not padded": ("7.npy", "expected 00001.npy, 00002.npy ..."),
    "beyond the end": ("00021.npy", "beyond the video's end: the manifest says 20 frames"),
}


@pytest.mark.parametrize("case", BAD_NAMES, ids=list(BAD_NAMES))
def test_bad_numbers_stop_an_import_before_it_begins(case: str, tree: Path, tmp_path: Path) -> None:
    """A shifted numbering would pair every embedding with its neighbour's label."""
    name, words = BAD_NAMES[case]
    shutil.copy(tree / "a" / "00001.npy", tree / "a" / name)
    with pytest.raises(DataError) as caught:
        import_features(manifest(**LENGTHS, gone=3), tree, tmp_path / "s")
    assert f"{tree / 'a' / name} is " in str(caught.value)
    assert words in str(caught.value)
    assert f"{tree / 'gone'} is not there" in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_folders_that_hold_no_features_are_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the manifest's 3 videos \(it holds features_mean\)"):
        import_features(manifest(**LENGTHS), tree.parent, tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither folders nor"):
        import_features(manifest(**LENGTHS), tmp_path / "empty", tmp_path / "s")
    with pytest.raises(DataError, match="holds no embedding of any frame"):
        import_features(manifest(faceless=4), tree, tmp_path / "s")
    np.save(tree / "faceless" / "00001.npy", np.zeros((1, DIM + 1)))  # good in itself, and the others too
    with pytest.raises(DataError, match=r"faceless has embeddings of width 6\nexpected 5, as .*a has it"):
        import_features(manifest(**LENGTHS), tree, tmp_path / "s")
    (tree / "a.h5").write_bytes(b"")
    with pytest.raises(DataError, match="both folders and"):
        import_features(manifest(**LENGTHS), tree, tmp_path / "s")


HDF5 = {
    "another length": ({"embeddings": np.zeros((19, DIM)), "valid": np.ones(19, bool)}, r"\(19, 5\) of float64; expec"),
    "no valid": ({"embeddings": np.zeros((20, DIM))}, "has no dataset valid"),
    "integers": ({"embeddings": np.zeros((20, DIM), int), "valid": np.ones(20, bool)}, "of int64; expected"),
    "valid of another length": ({"embeddings": np.zeros((20, DIM)), "valid": np.ones(3, bool)}, r"valid is \(3,\)"),
    "valid beyond 1": ({"embeddings": np.zeros((20, DIM)), "valid": np.full(20, 2)}, "or of 0 and 1"),
    "valid as text": ({"embeddings": np.zeros((20, DIM)), "valid": [b"x"] * 20}, "valid is"),
    "not a number": ({"embeddings": np.full((20, DIM), np.nan), "valid": np.ones(20, bool)}, "not numbers"),
    "no datasets": ({}, "has no dataset embeddings and no valid"),
}


@pytest.mark.parametrize("case", HDF5, ids=list(HDF5))
def test_bad_hdf5_files_are_named(case: str, tmp_path: Path) -> None:
    datasets, words = HDF5[case]
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in" / "a.h5", "w") as file:
        for name, values in datasets.items():
            file[name] = values
    with pytest.raises(DataError, match=rf"a\.h5.*{words}"):
        import_features(manifest(a=20), tmp_path / "in", tmp_path / "s")
    (tmp_path / "in" / "a.h5").write_text("text")
    with pytest.raises(DataError, match=r"a\.h5 cannot be read as HDF5"):
        import_features(manifest(a=20), tmp_path / "in", tmp_path / "s")


def test_what_stands_in_frames_that_are_not_valid_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in" / "a.h5", "w") as file:
        file["embeddings"] = np.array([[np.nan, 1e9], [1.0, 2.0]])
        file["valid"] = np.array([0, 1], np.uint8)
    import_features(manifest(a=2), tmp_path / "in", tmp_path / "s")
    assert open_store(tmp_path / "s").embeddings("a").tolist() == [[0, 0], [1, 2]]


def test_a_store_keeps_to_what_it_was_made_from(tree: Path, tmp_path: Path) -> None:
    import_features(manifest(**LENGTHS), tree, tmp_path / "s")
    assert open_store(tmp_path / "s").fingerprint["imported"] == "tree"
    np.save(tree / "a" / "00001.npy", np.zeros(DIM, np.float32))
    with pytest.raises(StoreError, match="digest: found"):
        import_features(manifest(**LENGTHS), tree, tmp_path / "s")
    with pytest.raises(StoreError, match="made by `vnaw import`; `vnaw extract` does not add"):
        create_store(tmp_path / "s", {"encoder": "e"}, DIM)
    create_store(tmp_path / "extracted", {"encoder": "e"}, DIM)
    with pytest.raises(StoreError, match="made by `vnaw extract`; `vnaw import` does not add"):
        import_features(manifest(**LENGTHS), tree, tmp_path / "extracted")


@pytest.mark.parametrize("layout", ["tree", "hdf5"])
def test_frames_that_come_late_or_go_are_imported_again(
    layout: Layout, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of a copy that was still going on; also if the import that notices is killed."""
    lengths = manifest(**LENGTHS)
    whole, partly = tmp_path / "whole", tmp_path / "partly" / "features_mean"
    if layout == "tree":
        shutil.copytree(tree, whole)
    else:
        export_features(import_into(tree, tmp_path / "all"), whole, layout)
    shutil.copytree(whole, partly)
    if layout == "tree":
        for number in (3, 6):
            (partly / "a" / f"{number:05d}.npy").unlink()
    else:
        with h5py.File(partly / "a.h5", "r+") as file:
            file["valid"][[2, 5]] = False
    store = tmp_path / "s"
    import_features(lengths, partly, store)
    assert open_store(store).valid("a").sum() == len(VALID["a"]) - 2
    shutil.rmtree(partly)
    shutil.copytree(whole, partly)
    monkeypatch.setattr(FeatureStore, "write_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_features(lengths, partly, store)
    monkeypatch.undo()
    monkeypatch.setattr(store_module, "CHUNK_FRAMES", 8)
    assert import_features(lengths, partly, store).done == 1
    assert_holds_the_frames(open_store(store))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def import_into(tree: Path, store: Path) -> Path:
    import_features(manifest(**LENGTHS), tree, store)
    return store


def test_a_lost_chunk_is_imported_again(tree: Path, place: Location) -> None:
    import_features(manifest(**LENGTHS), tree, place / "s")
    (place / "s" / "plain" / "a" / "c" / "1" / "0").unlink()
    with pytest.raises(StoreError, match="Run `vnaw import` "):
        open_store(place / "s").embeddings("a")
    report = import_features(manifest(**LENGTHS), tree, place / "s")
    assert (report.done, report.skipped, report.frames) == (1, 4, 8)
    assert_holds_the_frames(open_store(place / "s"))


def test_an_export_goes_on_and_is_never_a_mix(tree: Path, tmp_path: Path) -> None:
    import_features(manifest(**LENGTHS), tree, tmp_path / "s")
    out = tmp_path / "out"
    (out / ".a.partial").mkdir(parents=True)  # what a kill leaves
    with pytest.raises(DataError, match="not empty and holds no export"):
        export_features(tmp_path / "s", out)
    shutil.rmtree(out)
    assert export_features(tmp_path / "s", out).done == 3
    shutil.rmtree(out / "a")
    (out / ".a.partial").mkdir()
    (out / ".a.partial" / "00001.npy").write_bytes(b"half")
    report = export_features(tmp_path / "s", out)
    assert (report.done, report.skipped) == (1, 2)
    assert not (out / ".a.partial").exists()
    import_features(manifest(**LENGTHS), out, tmp_path / "back")
    assert_holds_the_frames(open_store(tmp_path / "back"))
    with pytest.raises(DataError, match="export of other features: name: found 'features_mean', wanted 'out'"):
        export_features(tmp_path / "back", out)
    with pytest.raises(DataError, match="layout: found 'tree', wanted 'hdf5'"):
        export_features(tmp_path / "s", out, "hdf5")
    with pytest.raises(StoreError, match="lacks 1 of 1 videos"):
        export_features(tmp_path / "s", tmp_path / "more", "tree", manifest(other=3))


def test_the_commands(tree: Path, tmp_path: Path) -> None:
    write_manifest(manifest(**LENGTHS), tmp_path / "m.csv")
    taken = CliRunner().invoke(
        app,
        ["import", "--manifest", f"{tmp_path}/m.csv", "--features", str(tree), "--store", f"{tmp_path}/s"],
        catch_exceptions=False,
    )
    assert taken.exit_code == 0, taken.output
    assert "import: 5 chunks done, 0 skipped" in taken.output
    given = CliRunner().invoke(
        app,
        ["export", "--store", f"{tmp_path}/s", "--out", f"{tmp_path}/out", "--layout", "hdf5"],
        catch_exceptions=False,
    )
    assert given.exit_code == 0, given.output
    assert "export: 3 videos done, 0 skipped" in given.output
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.h5")) == sorted(LENGTHS)
