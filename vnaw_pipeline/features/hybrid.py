"""A Swin that begins with convolutions, as a timm model: `encoder.name: swin_hybrid`.

Few labelled faces teach a Swin's patch embedding little. Here the first stages of a convolutional model stand in its
place (early convolutions: Xiao et al., NeurIPS 2021; as a backbone below a Transformer: Dosovitskiy et al., ViT 3.1).
They come trained, with the weights file that training starts from, and are kept as they are.
"""

from functools import partial
from typing import Any

import timm
from timm.layers.hybrid_embed import HybridEmbed
from timm.models import register_model
from torch import nn

_STEM_STAGE = 2
"""The last stage of the stem, counted as timm counts features: it has an eighth of the image's side."""
_TOKEN_PX = 8


@register_model
def swin_hybrid(pretrained: bool = False, stem: str = "tf_efficientnet_lite0", **swin_args: Any) -> nn.Module:
    """timm's `swin_tiny_patch4_window7_224` over tokens of 8 x 8 pixels that the timm model `stem` makes.

    Args:
        pretrained: must be False, there are no such weights to download.
        stem: timm model whose first three stages are used, without gradient.
        swin_args: further arguments of timm's model, such as img_size, embed_dim or depths; not patch_size.
    """
    if pretrained:
        raise RuntimeError("swin_hybrid has no weights on a hub")
    backbone = timm.create_model(stem, features_only=True, feature_cls="getter", out_indices=(_STEM_STAGE,))
    backbone.requires_grad_(False)
    embed = partial(_embed, backbone)
    return timm.create_model("swin_tiny_patch4_window7_224", patch_size=_TOKEN_PX, embed_layer=embed, **swin_args)


def _embed(backbone: nn.Module, *, norm_layer: Any, patch_size: Any, **arguments: Any) -> nn.Module:
    """What a Swin makes as its patch embedding; a token is one place of the features."""
    return HybridEmbed(backbone, patch_size=1, **arguments)
