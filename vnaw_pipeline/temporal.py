"""The temporal model: a Transformer over the embeddings of a window, one answer per frame.

`B` windows, `P` frames, `D` embedding width, `W` model width, `H` heads, `K` classes. Source: Lee et al., V-NAW
(CVPRW 2025) 3.6, with the sizes of the authors' public code as the defaults of `TemporalConfig`. Own layers stand for
`torch.nn.TransformerEncoder`, because rotary positions act between its projections and its attention; names of
parameters, start values and numbers are those of torch's.
"""

import copy
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vnaw_pipeline.config import TemporalConfig

TCN_KERNEL = 3
"""Frames that a temporal convolution sees at once."""
_LEVELS = 2**16
"""A CPU draws the mask of four elements as one 64-bit word, so a chance is a whole number of these."""


class TemporalModel(nn.Module):
    """Projection, temporal convolutions if there are any, Transformer encoder, and a linear head per frame."""

    def __init__(self, embedding_dim: int, num_classes: int, config: TemporalConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(embedding_dim, config.width)
        self.tcn = nn.ModuleList(ConvolutionBlock(config, dilation=2**i) for i in range(config.tcn_blocks))
        self.encoder = Encoder(config)
        self.head = nn.Linear(config.width, num_classes)
        self.config = config

    def forward(self, embeddings: Tensor, valid: Tensor, places: Tensor | None = None) -> Tensor:
        """Logits (B, P, K) from embeddings (B, P, D) and valid (B, P); or, of windows that overlap, from their frames
        (U, D) and (U,), and the windows' places among them, `places` (B, P). What depends on a frame alone, up to the
        projections of the first layer, is then made once for each.

        A frame that is not valid is seen by no other frame; what the model says at its place means nothing. A window
        without any valid frame gives finite logits.
        """
        embeddings = embeddings.masked_fill(~valid[..., None], 0)  # NaN would pass a mask of attention as NaN * 0
        hidden = self.projection(embeddings.to(self.projection.weight.dtype))
        if places is not None:
            valid = valid[places]
            if self.tcn or self.config.position == "sinusoidal":  # a frame is not alike in all its windows
                hidden, places = windows_of(hidden, places), None
        for block in self.tcn:
            hidden = block(hidden, valid)
        if self.config.position == "sinusoidal":
            hidden = hidden + sinusoidal_positions(hidden.shape[1], hidden.shape[2], hidden.device).to(hidden)
        hidden = self.encoder(hidden, attention_mask(valid, causal=self.config.causal), places)
        logits: Tensor = self.head(hidden)
        return logits


def windows_of(frames: Tensor, places: Tensor | None) -> Tensor:
    """Windows (B, P, W) of frames (U, W); without `places` (B, P) they are windows already."""
    return frames if places is None else frames.index_select(0, places.flatten()).view(*places.shape, -1)


def kept_bytes(config: TemporalConfig, num_frames: int) -> int:
    """About as much as the way back of a window in training keeps in float32 on a CPU, without weights."""
    of_layer = num_frames * (9 * config.width + config.feed_forward + 2 * config.heads * num_frames)
    return 4 * of_layer * (config.layers + config.tcn_blocks)


class ConvolutionBlock(nn.Module):
    """Two dilated convolutions over time, added to what came in (Bai et al. 2018, without their weight norm).

    Sees `TCN_KERNEL // 2 * dilation` frames to either side, or `(TCN_KERNEL - 1) * dilation` back if the model is
    causal, twice. In front of a Transformer: Zhou et al. (CtyunAI, arXiv:2403.11440).
    """

    def __init__(self, config: TemporalConfig, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(config.width, config.width, TCN_KERNEL, dilation=dilation)
        self.second = nn.Conv1d(config.width, config.width, TCN_KERNEL, dilation=dilation)
        self.dropout = Dropout(config.dropout)
        reach = (TCN_KERNEL - 1) * dilation
        self.padding = (reach, 0) if config.causal else (reach // 2, reach // 2)

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """(B, P, W) from (B, P, W) and valid (B, P). An invalid frame is zero in each convolution, as padding is."""
        branch = hidden
        for convolution in (self.first, self.second):
            branch = branch.masked_fill(~valid[:, :, None], 0)
            padded = F.pad(branch.transpose(1, 2), self.padding)
            branch = self.dropout.of_relu(convolution(padded).transpose(1, 2))
        return (hidden + branch).relu()


class Encoder(nn.Module):
    """The Transformer's layers, one after the other. They start alike, as torch's do.

    Stochastic depth grows linearly with depth, to `drop_path` in the last layer.
    """

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        first = EncoderLayer(config)
        self.layers = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(config.layers - 1))])
        self.drop_path = config.drop_path

    def forward(self, hidden: Tensor, seen: Tensor, places: Tensor | None = None) -> Tensor:
        """(B, P, W) from (B, P, W), or from frames (U, W) and their `places`, and the attention mask (B, 1, P, P)."""
        for depth, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden, seen, self.drop_path * depth / len(self.layers), places)
            places = None  # they are windows from here on
        return hidden


class EncoderLayer(nn.Module):
    """Self-attention, then a feed-forward part; each is added to what came in, and the sum is normalised."""

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        self.self_attn: SelfAttention | MergedAttention = SelfAttention(config)
        self.linear1 = nn.Linear(config.width, config.feed_forward)
        self.linear2 = nn.Linear(config.feed_forward, config.width)
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, hidden: Tensor, seen: Tensor, drop_path: float, places: Tensor | None = None) -> Tensor:
        """(B, P, W) from (B, P, W), or from frames (U, W) and their `places`; `drop_path` is the chance that a window
        passes by each part in training."""
        drop_path = drop_path if self.training else 0.0
        attended = self.dropout(self.self_attn(hidden, seen, places))
        hidden = self.norm1(windows_of(hidden, places) + stochastic_depth(attended, drop_path))
        widened = self.dropout.of_relu(self.linear1(hidden))
        out: Tensor = self.norm2(hidden + stochastic_depth(self.dropout(self.linear2(widened)), drop_path))
        return out


class SelfAttention(nn.Module):
    """Attention of a window's frames to one another."""

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.width))
        self.out_proj = nn.Linear(config.width, config.width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self.heads = config.heads
        self.dropout = config.dropout
        self.rotary = config.position == "rotary"

    def forward(self, hidden: Tensor, seen: Tensor, places: Tensor | None = None) -> Tensor:
        """(B, P, W) from (B, P, W), or from frames (U, W) and their `places`; `seen` (B, 1, P, P) is true where a frame
        (row) may look at a frame (column)."""
        projected = windows_of(F.linear(hidden, self.in_proj_weight, self.in_proj_bias), places)
        of_heads = projected.view(*projected.shape[:2], 3, self.heads, -1)
        query, key, value = of_heads.permute(2, 0, 3, 1, 4)  # each (B, H, P, W / H)
        if self.rotary:
            query, key = rotate(query), rotate(key)
        attended = attention(query, key, value, seen, self.dropout if self.training else 0.0)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out

    def merged(self) -> "SelfAttention | MergedAttention":
        """The same for evaluation, with half the projections if it has one head and no rotary positions; a forward pass
        of the default model then takes .7 of the time."""
        return self if self.heads > 1 or self.rotary else MergedAttention(self)


class MergedAttention(nn.Module):
    """What `SelfAttention` of one head answers in evaluation, with two projections where it has four.

    A score is (Q x + q)·(K y + k) of a frame x that looks at y. Its terms without y are alike for all y, so softmax
    does not see them; what is left is (K'Q x + K'q)·y. The weights of a frame add up to one, so value and output
    projections are one too. Both products, and the scale of the scores, are made once, in float64.
    """

    def __init__(self, of: SelfAttention) -> None:
        super().__init__()
        query, key, value = of.in_proj_weight.detach().double().chunk(3)
        query_bias, _, value_bias = of.in_proj_bias.detach().double().chunk(3)
        out, out_bias = of.out_proj.weight.detach().double(), of.out_proj.bias.detach().double()
        key = key * len(key) ** -0.5
        self.query = _linear_of(key.T @ query, key.T @ query_bias)
        self.value = _linear_of(out @ value, out @ value_bias + out_bias)

    def forward(self, hidden: Tensor, seen: Tensor, places: Tensor | None = None) -> Tensor:
        """As that of `SelfAttention`."""
        query, key, value = (windows_of(of, places) for of in (self.query(hidden), hidden, self.value(hidden)))
        scores = (query @ key.transpose(1, 2)).masked_fill_(~seen[:, 0], -math.inf)
        out: Tensor = scores.softmax(dim=-1) @ value
        return out


def _linear_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
    return linear


def for_prediction(model: TemporalModel) -> TemporalModel:
    """A copy in evaluation, which shares the weights that it does not merge, and answers as the model does."""
    weights = itertools.chain(model.parameters(), model.buffers())
    copied = copy.deepcopy(model, {id(weight): weight for weight in weights})
    for layer in copied.encoder.modules():
        if isinstance(layer, EncoderLayer) and isinstance(layer.self_attn, SelfAttention):
            layer.self_attn = layer.self_attn.merged()
    return copied.eval()


class Dropout(nn.Module):
    """`torch.nn.Dropout`, with the mask of `dropout`."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, which stays; in evaluation x itself."""
        return dropout(x, self.probability) if self.training else x

    def of_relu(self, x: Tensor) -> Tensor:
        """That of `x.relu()`, which keeps one tensor for the way back and not three."""
        if self.training and self.probability > 0 and _draws_words(x):
            out: Tensor = _ReluDropout.apply(x, self.probability)
            return out
        return self.forward(x.relu())


def dropout(x: Tensor, probability: float) -> Tensor:
    """Each element zero with this chance, the others scaled up so that their mean stays.

    On a CPU, where PyTorch draws element by element on one core, which was a third of a training step, the chance is
    rounded to 2**-16, and neither none nor all; elsewhere, and when it is compiled, this is PyTorch's own.
    """
    if probability == 0 or not _draws_words(x):
        return F.dropout(x, probability)
    out: Tensor = _Dropout.apply(x, probability)
    return out


class _Dropout(torch.autograd.Function):
    """Keeps a byte an element for the way back; the factors, which a product would keep, are four."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        stays, ctx.scale = _draw_stays(x.shape, probability)
        ctx.save_for_backward(stays)
        return stays.to(x.dtype).mul_(ctx.scale).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (stays,) = ctx.saved_tensors
        return stays.to(grad.dtype).mul_(ctx.scale).mul_(grad), None


class _ReluDropout(torch.autograd.Function):
    """Keeps what comes out alone: it is above zero where neither of the two made it zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        stays, ctx.scale = _draw_stays(x.shape, probability)
        out = x.relu().mul_(stays.to(x.dtype).mul_(ctx.scale))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return out.sign().mul_(ctx.scale).mul_(grad), None


def _draw_stays(shape: torch.Size, probability: float) -> tuple[Tensor, float]:
    """Which elements stay, as int8 of 0 and 1, and what they are scaled by."""
    dropped = min(max(round(probability * _LEVELS), 1), _LEVELS - 1)
    last = dropped - _LEVELS // 2 - 1  # the greatest word whose element goes
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    drawn = words.view(torch.int16)[: shape.numel()].view(shape)
    stays = drawn.clamp_(last, last + 1).sub_(last).to(torch.int8)  # a third of the time of a comparison
    return stays, _LEVELS / (_LEVELS - dropped)


def attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, probability: float) -> Tensor:
    """`F.scaled_dot_product_attention` (B, H, P, E) with dropout of what is looked at, by the mask of `dropout`.

    `seen` (B, 1, P, P) is true where a frame (row) may look at a frame (column), of which each has one at least.
    """
    if probability == 0 or not _draws_words(query):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=probability)
    scores = (query @ key.transpose(-2, -1)).mul_(query.shape[-1] ** -0.5)
    looked_at = scores.masked_fill_(~seen, -math.inf).softmax(dim=-1)
    return dropout(looked_at.to(value.dtype), probability) @ value


def _draws_words(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def stochastic_depth(branch: Tensor, probability: float) -> Tensor:
    """A branch (B, ...) without some of its windows, each left out whole with the same chance, the others scaled up so
    that its mean stays (Huang et al. 2016)."""
    if probability == 0:
        return branch
    stays = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device) >= probability
    return branch * stays / (1 - probability)


def attention_mask(valid: Tensor, *, causal: bool) -> Tensor:
    """Which frames each frame may look at, bool (B, 1, P, P) from valid (B, P): the valid ones, and if causal none
    after it. Every frame may look at itself, so that no softmax is over nothing."""
    num_frames = valid.shape[1]
    seen = valid[:, None, :].expand(-1, num_frames, -1)
    if causal:
        seen = seen.tril()
    return (seen | torch.eye(num_frames, dtype=torch.bool, device=valid.device))[:, None]


def rotate(heads: Tensor) -> Tensor:
    """Turn queries or keys (B, H, P, E), E even, by angles that grow with a frame's position.

    Their products then depend on how far apart two frames are, not on where they stand. Source: Su et al., RoFormer
    (2021) 3.4.2, but channel i is paired with channel i + E / 2 and not with its neighbour: the same in another order.
    """
    half = heads.shape[-1] // 2
    position = torch.arange(heads.shape[-2], device=heads.device)[:, None]
    angle = position / 10_000 ** (torch.arange(half, device=heads.device) / half)
    cos, sin = angle.cos(), angle.sin()  # float32 also under mixed precision, where near frames would fall together
    x, y = heads[..., :half], heads[..., half:]
    return torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1).to(heads.dtype)


def sinusoidal_positions(num_frames: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed position codes (P, width): sines in the even channels, cosines in the odd ones (Vaswani et al. 2017)."""
    position = torch.arange(num_frames, device=device)[:, None]
    channel = torch.arange(width, device=device)[None, :]
    angle = position / 10_000 ** ((channel - channel % 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
