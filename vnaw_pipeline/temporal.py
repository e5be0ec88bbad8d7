"""The temporal model: a Transformer over the embeddings of a window, one answer per frame.

`B` windows, `P` frames, `D` embedding width, `K` classes. Source: Lee et al., V-NAW (CVPRW 2025) 3.6, with the sizes of
the authors' public code as the defaults of `TemporalConfig`.
"""

import torch
from torch import Tensor, nn

from vnaw_pipeline.config import TemporalConfig


class TemporalModel(nn.Module):
    """Projection, Transformer encoder, and a linear head per frame."""

    def __init__(self, embedding_dim: int, num_classes: int, config: TemporalConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(embedding_dim, config.width)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, config.feed_forward, config.dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.head = nn.Linear(config.width, num_classes)
        self.config = config

    def forward(self, embeddings: Tensor, valid: Tensor) -> Tensor:
        """Logits (B, P, K) from embeddings (B, P, D) and valid (B, P).

        A frame that is not valid is seen by no other frame; what the model says at its place means nothing. A window
        without any valid frame gives finite logits.
        """
        frames = self.projection(embeddings.to(self.projection.weight.dtype))
        if self.config.position == "sinusoidal":
            frames = frames + sinusoidal_positions(frames.shape[1], frames.shape[2]).to(frames)
        hidden = self.encoder(frames, mask=self._attention_mask(valid))
        logits: Tensor = self.head(hidden)
        return logits

    def _attention_mask(self, valid: Tensor) -> Tensor:
        """What each frame must not look at, (B * heads, P, P). Every frame may look at itself, so that no softmax is
        over nothing."""
        num_frames = valid.shape[1]
        hidden = ~valid[:, None, :].expand(-1, num_frames, -1)
        if self.config.causal:
            hidden = hidden | torch.ones(num_frames, num_frames, dtype=torch.bool, device=valid.device).triu(1)
        itself = torch.eye(num_frames, dtype=torch.bool, device=valid.device)
        return (hidden & ~itself).repeat_interleave(self.config.heads, dim=0)


def sinusoidal_positions(num_frames: int, width: int) -> Tensor:
    """Fixed position codes (P, width): sines in the even channels, cosines in the odd ones (Vaswani et al. 2017)."""
    position = torch.arange(num_frames)[:, None]
    channel = torch.arange(width)[None, :]
    angle = position / 10_000 ** ((channel - channel % 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
