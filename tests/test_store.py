"""The feature store: what is written is read, what is half there is not done, what is foreign is refused."""

import multiprocessing
import os
import shutil
import signal
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vnaw_pipeline.errors import StoreError
from vnaw_pipeline.features.bank import open_bank
from vnaw_pipeline.features.store import CHUNK_FRAMES, FeatureStore, create_store, open_store
from vnaw_pipeline.locations import Location, files_below
from vnaw_pipeline.provenance import write_bytes

FINGERPRINT = {"encoder": "e", "weights": "w", "mean": [0.1, 0.2, 0.3]}


def fill(store: FeatureStore, video_id: str, num_frames: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    embeddings = generator.standard_normal((num_frames, store.embedding_dim)).astype(np.float16)
    store.add_video(video_id, num_frames)
    for unit in store.missing_units([video_id]):
        rows = embeddings[unit.start : unit.stop]
        store.write_unit(unit, rows, np.arange(unit.start, unit.stop) % 5 != 0)
    return embeddings


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_frames=st.sampled_from([1, 2, 99, CHUNK_FRAMES - 1, CHUNK_FRAMES, CHUNK_FRAMES + 1, 2 * CHUNK_FRAMES + 5]))
def test_what_is_written_is_read(place: Location, num_frames: int) -> None:
    path = place / uuid.uuid4().hex
    written = fill(create_store(path, FINGERPRINT, 3), "v", num_frames)
    store = open_store(path)
    assert (store.embeddings("v") == written).all()
    assert (store.valid("v") == (np.arange(num_frames) % 5 != 0)).all()
    assert store.missing_units(["v"]) == []


def test_a_chunk_of_zeros_is_done_once_written(place: Location) -> None:
    """Zarr leaves all-zero chunks out unless told; a video without a face would be extracted for ever."""
    store = create_store(place / "s", FINGERPRINT, 3)
    store.add_video("v", 10)
    (unit,) = store.missing_units(["v"])
    store.write_unit(unit, np.zeros((10, 3), np.float16), np.zeros(10, np.bool_))
    assert store.missing_units(["v"]) == []


def test_a_cut_off_chunk_is_missing(place: Location) -> None:
    store = create_store(place / "s", FINGERPRINT, 3)
    fill(store, "v", CHUNK_FRAMES + 9)
    chunk = place / "s" / "plain" / "v" / "c" / "1" / "0"
    write_bytes(chunk, chunk.read_bytes()[:100])
    assert [(u.start, u.stop) for u in store.missing_units(["v"])] == [(CHUNK_FRAMES, CHUNK_FRAMES + 9)]
    with pytest.raises(StoreError, match="lacks 1 of 1 videos"):
        store.embeddings("v")


def test_a_chunk_that_does_not_say_which_frames_are_valid_is_missing(place: Location) -> None:
    """As a copy that was broken off leaves it; Zarr would read that no frame has a face."""
    store = create_store(place / "s", FINGERPRINT, 3)
    written = fill(store, "v", CHUNK_FRAMES + 9)
    (place / "s" / "valid" / "v" / "c" / "0").unlink()
    assert [(u.start, u.stop) for u in store.missing_units(["v"])] == [(0, CHUNK_FRAMES)]
    with pytest.raises(StoreError, match="lacks 1 of 1 videos"):
        store.valid("v")
    assert (fill(store, "v", CHUNK_FRAMES + 9) == written).all()
    assert store.valid("v").any()


def test_another_fingerprint_is_refused_with_what_differs(place: Location) -> None:
    create_store(place / "s", FINGERPRINT, 3)
    with pytest.raises(StoreError, match="weights: found 'w', wanted 'x'"):
        create_store(place / "s", {**FINGERPRINT, "weights": "x"}, 3)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty and is not a feature store"):
        create_store(tmp_path, FINGERPRINT, 3)
    with pytest.raises(StoreError, match="There is no feature store"):
        open_store(tmp_path / "nowhere")
    zarr.create_group(tmp_path / "other", attributes={"made_by": "somebody"})
    with pytest.raises(StoreError, match="not a feature store of this version"):
        open_store(tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(tmp_path / "broken")


def test_another_number_of_frames_is_refused(place: Location) -> None:
    store = create_store(place / "s", FINGERPRINT, 3)
    store.add_video("v", 10)
    store.add_video("v", 10)
    with pytest.raises(StoreError, match="with 10 frames, the manifest says 11"):
        store.add_video("v", 11)


def test_bank_holds_the_videos_end_to_end_and_a_zero_row(place: Location) -> None:
    store = create_store(place / "s", FINGERPRINT, 3)
    written = {name: fill(store, name, count, seed) for seed, (name, count) in enumerate([("a", 7), ("b", 4)])}
    bank = open_bank(store, ["b", "a"], shown=False)
    assert bank.first.tolist() == [0, 4, 11]
    assert (bank.embeddings.numpy() == np.concatenate([written["b"], written["a"], np.zeros((1, 3))])).all()
    assert not bank.valid[bank.zero_row]
    with pytest.raises(StoreError, match="lacks 1 of 2 videos"):
        open_bank(store, ["a", "c"], shown=False)


def test_what_kills_left_of_writes_is_swept(tmp_path: Path) -> None:
    left = ["zarr.01ab.partial", "plain/.zarr.2_c.partial.json", "failures/.v.0.3d.partial.json"]
    for name in left:
        write_bytes(tmp_path / "s" / name, b"{")
    store = create_store(tmp_path / "s", FINGERPRINT, 3)  # no store is there, but nothing else is
    write_bytes(tmp_path / "s" / "failures" / "a.partial.video.0.json", b"[]")
    store.remove_partial_files()
    assert sorted(files_below(tmp_path / "s")) == ["failures/a.partial.video.0.json", "zarr.json"]


def _write_for_ever(path: str) -> None:
    store = create_store(Path(path), FINGERPRINT, 64)
    generator = np.random.default_rng(0)
    embeddings = generator.standard_normal((CHUNK_FRAMES, 64)).astype(np.float16)
    for number in range(10_000):
        store.add_video(f"v{number}", CHUNK_FRAMES)
        store.write_unit(store.units(f"v{number}")[0], embeddings, np.ones(CHUNK_FRAMES, np.bool_))


@pytest.mark.parametrize("seconds", [0.25, 0.4])
def test_a_kill_loses_at_most_the_chunk_in_hand(tmp_path: Path, seconds: float) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(str(tmp_path / "s"),))
    writer.start()
    while not (tmp_path / "s" / "plain" / "v0" / "c" / "0" / "0").exists():
        time.sleep(0.01)
    time.sleep(seconds)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    store = open_store(tmp_path / "s", read_only=False)
    unfinished = {unit.video_id for unit in store.missing_units(store.video_ids())}
    assert len(unfinished) <= 1
    expected = np.random.default_rng(0).standard_normal((CHUNK_FRAMES, 64)).astype(np.float16)
    for video_id in set(store.video_ids()) - unfinished:
        assert (store.embeddings(video_id) == expected).all()
        assert store.valid(video_id).all()
    shutil.rmtree(tmp_path / "s")


def test_dropouts_that_earlier_versions_recorded_do_not_count(tmp_path: Path) -> None:
    made = {"encoder": "swin", "model_args": {"drop_path_rate": 0.3, "img_size": 112}}
    create_store(tmp_path / "s", made, 4)
    assert create_store(tmp_path / "s", {"encoder": "swin", "model_args": {"img_size": 112}}, 4).embedding_dim == 4
    with pytest.raises(StoreError, match=r"model_args: found .*112.*, wanted .*96"):
        create_store(tmp_path / "s", {"encoder": "swin", "model_args": {"img_size": 96}}, 4)
