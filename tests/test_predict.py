"""Prediction reads some videos at a time, and what it writes does not depend on how many."""

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vnaw_pipeline.bench.data import Video, manifest_of, write_run, write_store
from vnaw_pipeline.checkpoints import load_tensors, save_tensors
from vnaw_pipeline.config import PipelineConfig, PredictConfig
from vnaw_pipeline.errors import CheckpointError, StoreError
from vnaw_pipeline.features.bank import open_bank
from vnaw_pipeline.prediction import predict
from vnaw_pipeline.prediction.predict import parts_of_videos, predict_videos


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 100))
def test_parts_are_all_videos_in_order_and_as_many_as_fit(lengths: list[int], frames_at_once: int) -> None:
    parts = [lengths[part] for part in parts_of_videos(lengths, frames_at_once)]
    assert list(chain(*parts)) == lengths
    assert all(sum(part) <= frames_at_once or len(part) == 1 for part in parts)
    assert all(sum(part) + after[0] > frames_at_once for part, after in pairwise(parts))


def test_predictions_do_not_depend_on_how_many_videos_are_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = [Video(f"v{index}", "test", length) for index, length in enumerate((120, 73, 260, 5, 101))]
    temporal = {"width": 16, "layers": 1, "feed_forward": 16}
    config = PipelineConfig.model_validate({"temporal": temporal, "predict": {"smooth": {"kind": "mean"}}})
    store = write_store(tmp_path / "store.zarr", videos, 8)
    run = write_run(tmp_path / "run", store, config)
    loaded = []

    def counted(*arguments: object, **options: object) -> object:
        bank = open_bank(*arguments, **options)  # type: ignore[arg-type]
        loaded.append(bank.zero_row)
        return bank

    monkeypatch.setattr(predict, "open_bank", counted)
    tables = []
    for frames_at_once in (1_000, 200):
        monkeypatch.setattr(predict, "FRAMES_AT_ONCE", frames_at_once)
        predict_videos(manifest_of(videos), store.path, run.path, "test")
        tables.append(pd.read_parquet(run.predictions("test")))
    assert loaded == [559, 193, 260, 106]
    pd.testing.assert_frame_equal(*tables, rtol=1e-6)
    assert tables[1].video_id.tolist() == [video.video_id for video in videos for _ in range(video.num_frames)]
    missing = [*videos, Video("v9", "test", 30)]
    with pytest.raises(StoreError, match="lacks 1 of 6 videos"):
        predict_videos(manifest_of(missing), store.path, run.path, "test")
    longer = [Video("v0", "test", 121), *videos[1:]]
    with pytest.raises(StoreError, match="holds 120 frames of 'v0', the manifest 121"):
        predict_videos(manifest_of(longer), store.path, run.path, "test")
    assert len(loaded) == 4, "what is missing is seen before anything is predicted"


def test_bf16_moves_probabilities_a_little_and_is_told_in_the_table(tmp_path: Path) -> None:
    videos = [Video("v0", "test", 130)]
    config = PipelineConfig.model_validate({"temporal": {"width": 64, "layers": 2, "feed_forward": 64}})
    store = write_store(tmp_path / "store.zarr", videos, 32)
    run = write_run(tmp_path / "run", store, config)
    tables = []
    for precision in ("fp32", "bf16"):
        predict_videos(manifest_of(videos), store.path, run.path, "test", PredictConfig(precision=precision))
        tables.append(pd.read_parquet(run.predictions("test")))
        assert tables[-1].attrs["made_by"]["predict"]["precision"] == precision
    plain, fast = (table.filter(like="p_").to_numpy() for table in tables)
    assert fast.dtype == np.float32
    assert 0 < np.abs(fast - plain).max() < 0.02  # 8 bits of mantissa, two layers


def test_a_model_whose_answers_are_not_numbers_is_refused(tmp_path: Path) -> None:
    videos = [Video("v0", "test", 120)]
    config = PipelineConfig.model_validate({"temporal": {"width": 16, "layers": 1, "feed_forward": 16}})
    store = write_store(tmp_path / "store.zarr", videos, 8)
    run = write_run(tmp_path / "run", store, config)
    tensors, header = load_tensors(run.best)
    spoilt = {key: value * float("nan") if value.is_floating_point() else value for key, value in tensors.items()}
    save_tensors(run.best, spoilt, header)
    with pytest.raises(CheckpointError, match="not numbers"):
        predict_videos(manifest_of(videos), store.path, run.path, "test")
    assert not Path(str(run.predictions("test"))).exists()
