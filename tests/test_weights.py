"""The weights that ship: they load by name, are what their card says, and have not rotted."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vnaw_pipeline.features.encoder import WEIGHTS_DIR, encoder_of_weights, load_encoder, weights_header
from vnaw_pipeline.inference.analyse import DEFAULT_ENCODER
from vnaw_pipeline.prediction.faces import load_classifier
from vnaw_pipeline.rendering.face import draw_face
from vnaw_pipeline.rendering.identity import sample_identity
from vnaw_pipeline.tasks import ACTION_UNITS, EXPRESSIONS

SHIPPED = sorted(path.stem for path in WEIGHTS_DIR.glob("*.safetensors"))
CARD = (WEIGHTS_DIR / "README.md").read_text(encoding="utf-8")
LOOKS = {
    "Neutral": {},
    "Happiness": {"AU6": 1.0, "AU12": 1.0, "AU25": 0.7},
    "Surprise": {"AU1": 1.0, "AU2": 1.0, "AU25": 1.0, "AU26": 1.0},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_file_loads_by_name_with_its_head_and_has_a_card(name: str) -> None:
    encoder = load_classifier(name)
    assert encoder.outputs == EXPRESSIONS
    assert f"## {name}.safetensors" in CARD
    header = weights_header(Path(f"{name}.safetensors"))
    assert "config" not in header, "paths of the machine that trained it"
    assert header["mean"] == list(encoder.preprocessing.mean)


def test_together_they_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS_DIR.iterdir()) < 16e6
    assert DEFAULT_ENCODER in SHIPPED


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("fer_")])
def test_an_encoder_for_photographs_reads_rendered_faces(name: str) -> None:
    """It was trained on photographs; drawn smiles and open mouths are plain enough to be read all the same, six people
    each. The probabilities are those of the day the weights were made, to what bf16 may change."""
    encoder = load_encoder(encoder_of_weights(name))
    assert encoder.head is not None
    generator = np.random.default_rng(1)
    people = [sample_identity(generator) for _ in range(6)]
    found = {}
    for look, units in LOOKS.items():
        action_units = np.array([units.get(unit, 0.0) for unit in ACTION_UNITS])
        faces = np.stack([encoder.preprocessing.of_crop(draw_face(person, action_units)) for person in people])
        with torch.inference_mode():
            logits = encoder.head(encoder.model(encoder.preprocessing.normalise(torch.from_numpy(faces))))
        found[look] = float(logits.softmax(dim=1).mean(dim=0)[EXPRESSIONS.index(look)])
    of_encoder = CARD[CARD.index(f"## {name}.safetensors") :]
    stated = re.search(r"rendered faces: Neutral ([\d.]+), Happiness ([\d.]+), Surprise ([\d.]+)", of_encoder)
    assert stated is not None
    assert list(found.values()) == pytest.approx([float(value) for value in stated.groups()], abs=0.02)
    assert found["Happiness"] > 0.7
    assert found["Surprise"] > 0.5
