"""The Swin that begins with convolutions: its tokens are features of the model that its first stages come from."""

import re

import pytest
import timm
import torch

from vnaw_pipeline.config import EncoderConfig
from vnaw_pipeline.errors import ConfigError
from vnaw_pipeline.features.encoder import build_encoder, load_encoder, parameter_groups
from vnaw_pipeline.features.hybrid import swin_hybrid

STEM = "patch_embed.backbone.model."
SMALL = {"img_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
CONFIG = EncoderConfig(name="swin_hybrid", weights="untrained", model_args=SMALL)


def test_its_tokens_are_projected_features_of_the_stem() -> None:
    model, preprocessing, _ = build_encoder(CONFIG, 8)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    of_stem = {key: value for key, value in whole.state_dict().items() if f"{STEM}{key}" in model.state_dict()}
    model.load_state_dict({f"{STEM}{key}": value for key, value in of_stem.items()}, strict=False)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        stages = whole.forward_intermediates(images, indices=3, intermediates_only=True)  # type: ignore[operator]
        features = next(features for features in stages if features.shape[2:] == (8, 8))
        embed = model.eval().patch_embed
        torch.testing.assert_close(embed(images), embed.proj(features).permute(0, 2, 3, 1))
    assert preprocessing.input_px == 64
    assert load_encoder(CONFIG).embedding_dim == 16


def test_its_stages_can_be_frozen_and_its_arguments_are_checked() -> None:
    model, _, _ = build_encoder(CONFIG, 8)
    trained = {id(weight) for group in parameter_groups(model, 0.05, 0.7, 1) for weight in group["params"]}
    names = {name for name, weight in model.named_parameters() if id(weight) in trained}
    assert names
    assert not [name for name in names if name.startswith("patch_embed")]
    for wrong in ({"stem": "no_model"}, {"patch_size": 4}):
        with pytest.raises(ConfigError, match=re.escape("do not fit swin_hybrid")):
            build_encoder(CONFIG.model_copy(update={"model_args": wrong}), 8)
    with pytest.raises(ConfigError, match="could not be downloaded"):
        build_encoder(CONFIG.model_copy(update={"weights": "pretrained"}), 8)
    with pytest.raises(RuntimeError, match="no weights on a hub"):
        swin_hybrid(pretrained=True)
