"""Scoring an encoder's own head on static faces, by the path that videos take: float16 embeddings, then the head."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vnaw_pipeline.errors import CheckpointError, DataError, listing
from vnaw_pipeline.facesets.faces import FaceSet
from vnaw_pipeline.facesets.read import read_faces
from vnaw_pipeline.features.backends import make_encode, one_core_per_forward, resolve_arithmetic
from vnaw_pipeline.features.encoder import Encoder, encoder_of_weights, load_encoder, recorded_of
from vnaw_pipeline.metrics import ExpressionScores, face_scores
from vnaw_pipeline.processes import process_state
from vnaw_pipeline.tasks import EXPRESSIONS, IGNORE_LABEL, Split

_BATCH_FACES = 64


@dataclass(frozen=True)
class FaceScores:
    """Scores against the majority of the voters, macro-F1 over the classes that these chose for a face; how many faces
    were read, resized and encoded per second; and whether the weights record that they were learnt from just these
    faces, so that the scores say nothing of others."""

    scores: ExpressionScores
    frames_per_second: float
    learnt_from_these: bool

    def as_json(self) -> dict[str, Any]:
        """As a JSON object: shares in [0, 1]; per class its F1, recall and number of faces."""
        confusion = self.scores.confusion
        return {
            "accuracy": self.scores.accuracy,
            "macro_f1": self.scores.macro_f1,
            "num_classes": self.scores.num_classes,
            "per_class": {
                name: {
                    "f1": float(self.scores.f1[index]),
                    "recall": float(confusion[index, index] / max(1, confusion[index].sum())),
                    "num_faces": int(confusion[index].sum()),
                }
                for index, name in enumerate(EXPRESSIONS)
            },
            "confusion": confusion.tolist(),
            "num_faces": self.scores.num_frames,
            "learnt_from_these": self.learnt_from_these,
            "frames_per_second": round(self.frames_per_second, 1),
        }


def evaluate_faces(encoder: str | Path, faces: Path | FaceSet, split: Split = "validation") -> FaceScores:
    """Score an encoder's head on every face that has a majority label.

    Args:
        encoder: the name of one that ships, or a weights file that records what it is.
        faces: a set of static faces; of one with splits, its `split`.

    Raises:
        CheckpointError: no such encoder, or one without a head for the eight expressions.
        DataError: faces that cannot be read (the first 20 are named), or none with a majority.
    """
    opened = read_faces(faces, split) if isinstance(faces, Path) else faces
    labels = opened.majority()
    chosen = np.flatnonzero(labels != IGNORE_LABEL)
    if len(chosen) == 0:
        raise DataError(f"None of the {len(opened)} faces has a majority label.")
    started = time.monotonic()
    predicted = classify(load_classifier(encoder), opened, chosen).argmax(axis=1)
    seconds = time.monotonic() - started
    learnt_from = recorded_of(encoder_of_weights(encoder)).get("labels", {}).get("train")
    scores = face_scores(labels[chosen], predicted, len(EXPRESSIONS))
    return FaceScores(scores, len(chosen) / seconds, learnt_from == opened.digest())


def load_classifier(weights: str | Path) -> Encoder:
    """An encoder with a head for the eight expressions.

    Raises:
        CheckpointError: no such encoder, or it has no such head.
    """
    encoder = load_encoder(encoder_of_weights(weights))
    if encoder.head is None or encoder.outputs != EXPRESSIONS:
        raise CheckpointError(f"{weights} has no head for the eight expressions; it is an encoder for features only.")
    return encoder


def classify(encoder: Encoder, faces: FaceSet, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Probabilities (N, K) of the chosen faces (N,), by the encoder's head.

    Raises:
        DataError: faces that cannot be read.
    """
    arithmetic = resolve_arithmetic("auto", "auto", process_state().device)
    side = encoder.preprocessing.input_px
    assert encoder.head is not None
    head = encoder.head
    unreadable: list[str] = []

    with one_core_per_forward(arithmetic.device) as forwards, ThreadPoolExecutor(forwards) as pool:
        encode = make_encode(encoder, arithmetic, forwards, _BATCH_FACES)

        @torch.inference_mode()
        def run(part: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
            images = np.zeros((len(part), side, side, 3), np.uint8)
            for position, index in enumerate(part.tolist()):
                try:
                    images[position] = encoder.preprocessing.of_face(faces.image(index))
                except (DataError, OSError) as error:
                    unreadable.append(str(error))
            return np.asarray(head(torch.from_numpy(encode(images)).float()).softmax(dim=1).numpy())

        parts = list(pool.map(run, np.split(chosen, range(_BATCH_FACES, len(chosen), _BATCH_FACES))))
    if unreadable:
        raise DataError("Faces that cannot be read:\n" + listing(sorted(unreadable)))
    return np.concatenate(parts)
