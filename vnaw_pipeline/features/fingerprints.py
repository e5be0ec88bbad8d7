"""When features count as made alike."""

from collections.abc import Mapping
from typing import Any

from vnaw_pipeline.provenance import differences

_TRAINING_ARGS = ("drop_rate", "drop_path_rate")
"""Of a model's arguments, those that act in training only: neither weights nor embeddings depend on them."""


def lasting_args(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """A model's arguments without those that act in training only."""
    return {key: value for key, value in model_args.items() if key not in _TRAINING_ARGS}


def feature_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """As `differences` of two fingerprints. Those of earlier versions record all of a model's arguments."""
    return differences(_lasting(found), _lasting(wanted))


def _lasting(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    args = fingerprint.get("model_args")  # imported features have none
    return {**fingerprint, "model_args": lasting_args(args)} if args is not None else dict(fingerprint)
