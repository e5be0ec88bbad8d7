"""Facial expressions in video: embeddings once, temporal Transformers in minutes, noise-aware weighting.

Every stage is a function, and a store, a bank and a run open in one line each. They are imported when first used, so
`import vnaw_pipeline` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vnaw_pipeline.checks import check_manifest as check_manifest
    from vnaw_pipeline.config import load_config as load_config
    from vnaw_pipeline.crops.extract import extract_crops as extract_crops
    from vnaw_pipeline.experiments import ablate as ablate
    from vnaw_pipeline.experiments import cascade as cascade
    from vnaw_pipeline.experiments import cross_validate as cross_validate
    from vnaw_pipeline.features.bank import open_bank as open_bank
    from vnaw_pipeline.features.exchange import export_features as export_features
    from vnaw_pipeline.features.exchange import import_features as import_features
    from vnaw_pipeline.features.extract import extract_features as extract_features
    from vnaw_pipeline.features.store import open_store as open_store
    from vnaw_pipeline.inference.run import infer_video as infer_video
    from vnaw_pipeline.inference.run import infer_videos as infer_videos
    from vnaw_pipeline.manifests import build_manifest as build_manifest
    from vnaw_pipeline.manifests import read_manifest as read_manifest
    from vnaw_pipeline.prediction.combine import combine_runs as combine_runs
    from vnaw_pipeline.prediction.evaluate import evaluate_predictions as evaluate_predictions
    from vnaw_pipeline.prediction.faces import evaluate_faces as evaluate_faces
    from vnaw_pipeline.prediction.predict import predict_videos as predict_videos
    from vnaw_pipeline.prediction.predict import read_predictions as read_predictions
    from vnaw_pipeline.prediction.submission import write_submission as write_submission
    from vnaw_pipeline.prediction.tune import tune_run as tune_run
    from vnaw_pipeline.runs import open_run as open_run
    from vnaw_pipeline.tasks import TASKS as TASKS
    from vnaw_pipeline.training.faces import pretrain_encoder as pretrain_encoder
    from vnaw_pipeline.training.frames import finetune_encoder as finetune_encoder
    from vnaw_pipeline.training.windows import train_windows as train_windows

_HOMES = {
    "TASKS": "tasks",
    "ablate": "experiments",
    "build_manifest": "manifests",
    "cascade": "experiments",
    "check_manifest": "checks",
    "combine_runs": "prediction.combine",
    "cross_validate": "experiments",
    "evaluate_faces": "prediction.faces",
    "evaluate_predictions": "prediction.evaluate",
    "export_features": "features.exchange",
    "extract_crops": "crops.extract",
    "extract_features": "features.extract",
    "finetune_encoder": "training.frames",
    "import_features": "features.exchange",
    "infer_video": "inference.run",
    "infer_videos": "inference.run",
    "load_config": "config",
    "open_bank": "features.bank",
    "open_run": "runs",
    "open_store": "features.store",
    "predict_videos": "prediction.predict",
    "pretrain_encoder": "training.faces",
    "read_manifest": "manifests",
    "read_predictions": "prediction.predict",
    "train_windows": "training.windows",
    "tune_run": "prediction.tune",
    "write_submission": "prediction.submission",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vnaw_pipeline' has no attribute {name!r}")
    return getattr(import_module(f"vnaw_pipeline.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
