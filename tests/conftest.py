"""What several test files share: a small rendered data set, its manifest, and a config that trains in seconds."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import settings

from vnaw_pipeline import locations
from vnaw_pipeline.config import PipelineConfig
from vnaw_pipeline.features.extract import extract_features
from vnaw_pipeline.locations import Location, S3Path
from vnaw_pipeline.manifests import build_manifest, write_manifest
from vnaw_pipeline.rendering.dataset import render_dataset
from vnaw_pipeline.rendering.plan import DatasetPlan
from vnaw_pipeline.tasks import TASKS

from .buckets import s3_server

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("untimed")

TINY_PLAN = DatasetPlan(train_videos=4, validation_videos=2, test_videos=1, frames=(70, 90), short_frames=30)


@dataclass(frozen=True)
class DrawnData:
    """A rendered data set and its manifest, as table and as file."""

    root: Path
    manifest: pd.DataFrame
    manifest_path: Path

    @property
    def annotations(self) -> Path:
        return self.root / "annotations"

    @property
    def crops(self) -> Path:
        return self.root / "crops"

    @property
    def template(self) -> Path:
        return self.root / "test_set_examples" / "CVPR_6th_ABAW_Expr_test_set_example.txt"


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> DrawnData:
    root = tmp_path_factory.mktemp("drawn")
    render_dataset(root, TINY_PLAN, seed=3, workers=1, shown=False)
    template = root / "test_set_examples" / "CVPR_6th_ABAW_Expr_test_set_example.txt"
    manifest = build_manifest(root / "annotations", root / "crops", TASKS["expr8"], template=template)
    path = root / "manifest.csv"
    write_manifest(manifest, path)
    return DrawnData(root, manifest, path)


@pytest.fixture(scope="session")
def tiny_config() -> PipelineConfig:
    """A Swin of 30 thousand weights on 32 px, windows of 40 frames, three epochs."""
    return PipelineConfig.model_validate(
        {
            "encoder": {
                "weights": "untrained",
                "model_args": {
                    "img_size": 32,
                    "patch_size": 4,
                    "embed_dim": 8,
                    "depths": [1, 1],
                    "num_heads": [1, 2],
                    "window_size": 4,
                },
            },
            "finetune": {"frames_per_epoch": 32, "epochs": 2, "batch_frames": 16, "validation_frames": 40},
            "extract": {"batch_frames": 16, "precision": "fp32"},
            "windows": {"window_frames": 40, "train_stride": 20, "predict_stride": 20},
            "temporal": {"width": 16, "layers": 1, "heads": 2, "feed_forward": 32, "dropout": 0.2},
            "loss": {"level": "frame", "mix": "lam"},
            "train": {"epochs": 3, "batch_windows": 4, "learning_rate": 1e-2},
        }
    )


@pytest.fixture(scope="session")
def drawn_store(drawn: DrawnData, tiny_config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rendered data's embeddings by an untrained tiny encoder."""
    path = tmp_path_factory.mktemp("store") / "features.zarr"
    assert extract_features(drawn.manifest, drawn.crops, path, tiny_config).ok
    return path


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of a local S3 server with the bucket `bucket`."""
    pytest.importorskip("obstore", reason="the extra [s3] is not installed")
    pytest.importorskip("moto", reason="the extra [dev] is not installed")
    with s3_server("bucket") as port:
        yield port


@pytest.fixture
def use_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Points the pipeline at an S3 server on this machine."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anything")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def point_at(port: int) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        locations._client.cache_clear()

    yield point_at
    locations._client.cache_clear()


@pytest.fixture
def s3(s3_port: int, use_s3: Callable[[int], None]) -> S3Path:
    """An empty prefix on the server."""
    use_s3(s3_port)
    return S3Path("bucket", uuid.uuid4().hex)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Each of the places where a store may lie; a test that asks for it runs in both."""
    found: Location = tmp_path if request.param == "folder" else request.getfixturevalue("s3")
    return found
