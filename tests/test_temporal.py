"""The temporal model: torch's numbers at fixed weights, and the laws of padding, causality and positions.

What must not be seen is compared exactly. Elsewhere the same float32 sums run in another order, hence 1e-4 relative
and 1e-5 absolute.
"""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vnaw_pipeline.config import TemporalConfig
from vnaw_pipeline.temporal import (
    TCN_KERNEL,
    ConvolutionBlock,
    Dropout,
    MergedAttention,
    SelfAttention,
    TemporalModel,
    attention,
    dropout,
    for_prediction,
    kept_bytes,
    rotate,
    sinusoidal_positions,
    stochastic_depth,
)

VARIANTS: list[dict[str, Any]] = [
    {"position": position, "causal": causal, "tcn_blocks": tcn_blocks}
    for position, causal, tcn_blocks in itertools.product(("none", "sinusoidal", "rotary"), (False, True), (0, 2))
]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))


def model_of(**values: object) -> TemporalModel:
    torch.manual_seed(0)
    config = TemporalConfig.model_validate({"width": 16, "layers": 2, "heads": 2, "feed_forward": 32, **values})
    return TemporalModel(6, 3, config).eval()


def random_windows(seed: int, num_frames: int = 9, num_windows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(num_windows, num_frames, 6, generator=generator)
    return frames, torch.rand(num_windows, num_frames, generator=generator) < 0.7


@pytest.mark.parametrize("position", ["none", "sinusoidal"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_numbers_and_names_are_those_of_torchs_encoder(position: str, causal: bool, heads: int) -> None:
    """Runs that were trained with torch.nn.TransformerEncoder are read, and predict what they predicted."""
    model = model_of(position=position, causal=causal, heads=heads, dropout=0.0)
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, heads, 32, 0.0, batch_first=True)
    torchs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for parameter in torchs.parameters():  # norms and biases start at 1 and 0, where a mix-up would not show
        nn.init.normal_(parameter, std=0.3)
    model.encoder.load_state_dict(torchs.state_dict())
    frames, valid = random_windows(0)
    hidden = model.projection(frames * valid[:, :, None])
    if position == "sinusoidal":
        hidden = hidden + sinusoidal_positions(9, 16)
    unseen = ~valid[:, None, :].expand(-1, 9, -1)
    if causal:
        unseen = unseen | torch.ones(9, 9, dtype=torch.bool).triu(1)
    unseen = unseen & ~torch.eye(9, dtype=torch.bool)
    wanted = model.head(torchs(hidden, mask=unseen.repeat_interleave(heads, dim=0)))
    torch.testing.assert_close(model(frames, valid), wanted, rtol=1e-4, atol=1e-5)


@every_variant
@pytest.mark.parametrize("heads", [1, 2])
def test_windows_that_overlap_are_answered_from_their_frames_as_each_alone_is(
    variant: dict[str, Any], heads: int
) -> None:
    model = model_of(heads=heads, **variant)
    (frames,), (valid,) = random_windows(0, num_frames=20, num_windows=1)
    places = torch.arange(3)[:, None] * 5 + torch.arange(9)
    wanted = torch.cat([model(frames[at][None], valid[at][None]) for at in places])
    for each in (model, for_prediction(model)):
        torch.testing.assert_close(each(frames, valid, places), wanted, rtol=1e-4, atol=1e-5)


@every_variant
@pytest.mark.parametrize("heads", [1, 2])
def test_the_copy_for_prediction_answers_as_the_model_does(variant: dict[str, Any], heads: int) -> None:
    model = model_of(heads=heads, **variant)
    for parameter in model.parameters():  # biases start at 0, where a lost one would not show
        nn.init.normal_(parameter, std=0.3)
    before = copy.deepcopy(model.state_dict())
    frames, valid = random_windows(0, num_windows=8)
    valid[0] = False
    merged = for_prediction(model.train())
    assert model.training
    assert not any(module.training for module in merged.modules())
    assert [type(layer.self_attn) for layer in merged.encoder.layers] == [
        MergedAttention if heads == 1 and variant["position"] != "rotary" else SelfAttention
    ] * 2
    # float32 has seven digits, of which sums over 16 channels, 9 frames and two layers take two.
    torch.testing.assert_close(merged(frames, valid), model.eval()(frames, valid), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_copy_for_prediction_is_as_close_in_bf16_as_the_model() -> None:
    """Windows of 100 frames and the width of the default model, against float64; attention is made as sharp as
    training makes it. Scores are rounded where they are not inside PyTorch's own attention, hence a bound above 1."""
    torch.manual_seed(0)
    model = TemporalModel(32, 8, TemporalConfig(layers=2, dropout=0.0)).eval()
    for layer in model.encoder.layers:
        layer.self_attn.in_proj_weight.data[:1024] *= 4
    frames, valid = torch.randn(50, 100, 32), torch.rand(50, 100) < 0.9
    with torch.inference_mode():
        wanted = copy.deepcopy(model).double()(frames.double(), valid)
        with torch.autocast("cpu", torch.bfloat16):
            errors = [(each(frames, valid) - wanted).abs().mean() for each in (for_prediction(model), model)]
    assert errors[0] < 1.4 * errors[1]


def test_start_values_are_torchs() -> None:
    model = model_of()
    torch.manual_seed(0)
    projection = nn.Linear(6, 16)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    torchs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).state_dict()
    assert torch.equal(model.projection.weight, projection.weight)
    assert model.encoder.state_dict().keys() == torchs.keys()
    assert all(torch.equal(value, torchs[name]) for name, value in model.encoder.state_dict().items())


@every_variant
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), stuff=st.sampled_from([100.0, -1e30, math.inf, math.nan]))
def test_what_stands_at_invalid_frames_changes_nothing(variant: dict[str, Any], seed: int, stuff: float) -> None:
    model = model_of(**variant)
    frames, valid = random_windows(seed)
    changed = torch.where(valid[:, :, None], frames, stuff)
    assert torch.equal(model(frames, valid)[valid], model(changed, valid)[valid])
    frames.requires_grad_()
    (gradient,) = torch.autograd.grad(model(frames, valid)[valid].square().sum(), frames)
    assert (gradient[~valid] == 0).all()


@every_variant
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), now=st.integers(0, 7))
def test_causal_frames_do_not_see_the_future_and_others_do(variant: dict[str, Any], seed: int, now: int) -> None:
    model = model_of(**variant)
    frames, valid = random_windows(seed)
    valid = torch.ones_like(valid)
    changed = frames.clone()
    changed[:, now + 1 :] += 10
    before, after = model(frames, valid)[:, : now + 1], model(changed, valid)[:, : now + 1]
    assert torch.equal(before, after) == variant["causal"]


@every_variant
@pytest.mark.parametrize("shift", [0, 1, 5])
def test_a_window_gives_the_same_logits_wherever_it_stands_in_padding(variant: dict[str, Any], shift: int) -> None:
    """Sinusoidal codes tell where a frame stands; for them it must stand at the front."""
    model = model_of(**variant)
    frames, valid = random_windows(3, num_frames=7)
    alone = model(frames, valid)
    padded = torch.randn(2, 12, 6)
    padded[:, shift : shift + 7] = frames
    inside = torch.zeros(2, 12, dtype=torch.bool)
    inside[:, shift : shift + 7] = valid
    found = model(padded, inside)[:, shift : shift + 7]
    if shift and variant["position"] == "sinusoidal":
        assert not torch.allclose(found[valid], alone[valid], atol=1e-3)
    else:
        torch.testing.assert_close(found[valid], alone[valid], rtol=1e-4, atol=1e-5)


@every_variant
def test_one_frame_is_a_window(variant: dict[str, Any]) -> None:
    frames = torch.randn(3, 1, 6)
    logits = model_of(**variant)(frames, torch.ones(3, 1, dtype=torch.bool))
    assert logits.shape == (3, 1, 3)
    assert torch.isfinite(logits).all()


@every_variant
def test_a_window_without_any_frame_is_finite_and_has_finite_gradients(variant: dict[str, Any]) -> None:
    model = model_of(**variant, drop_path=0.3).train()
    logits = model(torch.zeros(2, 5, 6), torch.zeros(2, 5, dtype=torch.bool))
    assert torch.isfinite(logits).all()
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_variant
def test_inference_gives_what_training_mode_gives(variant: dict[str, Any]) -> None:
    model = model_of(**variant, dropout=0.0)
    frames, valid = random_windows(4)
    with torch.inference_mode():
        inferred = model(frames, valid)
    torch.testing.assert_close(inferred, model.train()(frames, valid), rtol=1e-4, atol=1e-5)


def test_only_with_positions_or_convolutions_the_order_of_frames_matters() -> None:
    frames, valid = torch.randn(1, 9, 6), torch.ones(1, 9, dtype=torch.bool)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for values in ({"position": "none"}, {"position": "sinusoidal"}, {"position": "rotary"}, {"tcn_blocks": 1}):
        model = model_of(**values)
        moved, plain = model(frames[:, order], valid), model(frames, valid)[:, order]
        if values == {"position": "none"}:
            torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-5)
        else:
            assert not torch.allclose(moved, plain, atol=1e-3), values


def test_position_codes() -> None:
    codes = sinusoidal_positions(50, 6)
    torch.testing.assert_close(codes[0], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(codes[3, 2], torch.tensor(3 / 10_000 ** (2 / 6)).sin())


def test_rotation_multiplies_pairs_of_channels_by_complex_phases() -> None:
    """Against complex numbers in float64; angles are made in float32, and up to 20 radians, hence 1e-5."""
    heads = torch.randn(2, 3, 20, 8, dtype=torch.float64)
    x = heads.numpy()
    rates = 10_000.0 ** -(np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * np.arange(20)[:, None] * rates)
    wanted = torch.from_numpy(np.concatenate([turned.real, turned.imag], axis=-1))
    torch.testing.assert_close(rotate(heads), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate(heads)[..., 0, :], heads[..., 0, :])


def test_rotated_products_depend_on_distance_only() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    products = (rotate(query.expand(1, 1, 30, 8)) @ rotate(key.expand(1, 1, 30, 8)).transpose(-1, -2))[0, 0]
    for distance in (-7, 0, 3, 11):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert (products[0] - products[0, 0]).abs().max() > 0.1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 4])
def test_convolutions_equal_a_loop_that_skips_invalid_frames(causal: bool, dilation: int) -> None:
    """In numpy, frame by frame: a tap that falls on an invalid frame or outside the window adds nothing."""
    torch.manual_seed(0)
    config = TemporalConfig(width=4, causal=causal, dropout=0.0)
    block = ConvolutionBlock(config, dilation).double()
    hidden = torch.randn(2, 13, 4, dtype=torch.float64)
    valid = torch.rand(2, 13) < 0.7
    taps = [(k - (TCN_KERNEL - 1 if causal else TCN_KERNEL // 2)) * dilation for k in range(TCN_KERNEL)]

    def convolve(x: np.ndarray, seen: np.ndarray, layer: nn.Conv1d) -> np.ndarray:
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        out = np.tile(bias, (len(x), 1))
        for t, (k, tap) in itertools.product(range(len(x)), enumerate(taps)):
            if 0 <= t + tap < len(x) and seen[t + tap]:
                out[t] += weight[:, :, k] @ x[t + tap]
        return np.maximum(out, 0)

    found = block(hidden, valid).detach().numpy()
    for x, seen, answer in zip(hidden.numpy(), valid.numpy(), found, strict=True):
        branch = convolve(convolve(x, seen, block.first), seen, block.second)
        np.testing.assert_allclose(answer, np.maximum(x + branch, 0), rtol=1e-10, atol=1e-12)


def test_blocks_see_twice_as_far_each() -> None:
    """Two blocks see 2 * 1 + 2 * 2 frames to either side, and no further."""
    blocks = model_of(tcn_blocks=2).tcn
    hidden = torch.rand(1, 30, 16, requires_grad=True)
    out, valid = hidden, torch.ones(1, 30, dtype=torch.bool)
    for block in blocks:
        out = block(out, valid)
    (gradient,) = torch.autograd.grad(out[0, 15].sum(), hidden)
    assert gradient[0].abs().sum(dim=1).nonzero()[:, 0].tolist() == list(range(9, 22))


def test_stochastic_depth_drops_windows_whole_and_keeps_the_mean() -> None:
    """4,000 windows at a chance of .3: the standard error of their mean is .01."""
    torch.manual_seed(0)
    found = stochastic_depth(torch.ones(4_000, 5, 3), 0.3)
    assert (found == found[:, :1, :1]).all()
    torch.testing.assert_close(found[found > 0].unique(), torch.tensor([1 / 0.7]))
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)


def test_stochastic_depth_acts_in_training_and_more_in_later_layers() -> None:
    frames, valid = torch.randn(64, 4, 6), torch.ones(64, 4, dtype=torch.bool)
    plain, dropping = model_of(dropout=0.0), model_of(dropout=0.0, drop_path=0.8)
    assert torch.equal(plain(frames, valid), dropping(frames, valid))
    assert not torch.allclose(plain(frames, valid), dropping.train()(frames, valid))
    seen: list[float] = []
    for layer in dropping.encoder.layers:
        layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    dropping(frames, valid)
    assert seen == pytest.approx([0.4, 0.8])


def test_rotary_needs_pairs_of_channels() -> None:
    with pytest.raises(ValueError, match=r"width 10 over 2 heads leaves 5 channels a head; make that even"):
        TemporalConfig(width=10, heads=2, position="rotary")


@given(st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.9]), st.integers(1, 9), st.integers(0, 2**31))
@settings(deadline=None)
def test_dropout_takes_its_share_and_keeps_the_mean(probability: float, odd: int, seed: int) -> None:
    """Five deviations of a binomial share; also for sizes that no word divides. What stays is scaled by 1 / (1 - p), up
    to the rounding of p, and the gradient by the same mask."""
    torch.manual_seed(seed)
    x = torch.ones(1000, odd, requires_grad=True)
    out = dropout(x, probability)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())
    kept = out.detach()[out.detach() != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - probability)), rtol=2**-12, atol=0)
    deviation = math.sqrt(probability * (1 - probability) / x.numel())
    assert abs(len(kept) / x.numel() - (1 - probability)) < 5 * deviation + 2**-16


@given(st.sampled_from([0.1, 0.5, 0.6]), st.integers(0, 2**31))
@settings(deadline=None)
def test_dropout_of_relu_is_dropout_after_relu(probability: float, seed: int) -> None:
    """By the same draws: the same numbers, and the same gradients, also where x is zero."""
    layer = Dropout(probability)
    start = torch.randn(50, 7, generator=torch.Generator().manual_seed(seed)).round(decimals=0)
    results = []
    for together in (True, False):
        x = start.clone().requires_grad_()
        torch.manual_seed(seed)
        out = layer.of_relu(x) if together else layer(x.relu())
        (out * torch.linspace(-1, 1, 7)).sum().backward()
        results.append((out, x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("probability", [1e-9, 1 - 1e-9])
def test_chances_next_to_none_and_all_are_near_them(probability: float) -> None:
    torch.manual_seed(0)
    out = dropout(torch.ones(100_000), probability)
    assert torch.isfinite(out).all()
    assert (out != 0).float().mean() == pytest.approx(1 - probability, abs=2e-4)
    assert out.max() <= 2**16


@pytest.mark.parametrize("variant", [{}, {"heads": 8}, {"tcn_blocks": 2}, {"width": 256, "feed_forward": 1024}])
def test_a_window_keeps_what_its_passes_count_on(variant: dict[str, Any]) -> None:
    """What autograd saves of a window in training, without the weights."""
    config = TemporalConfig.model_validate({"width": 512, "layers": 4, **variant})
    model, kept = TemporalModel(6, 3, config).train(), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model(torch.randn(3, 100, 6), torch.ones(3, 100, dtype=torch.bool)).sum()
    assert sum(kept.values()) / 3 == pytest.approx(kept_bytes(config, 100), rel=0.2)


def test_neighbours_of_one_random_word_fall_out_independently() -> None:
    torch.manual_seed(0)
    stays = (dropout(torch.ones(400_000), 0.4) != 0).float().view(-1, 4)
    correlation = torch.corrcoef(torch.cat([stays[:-1], stays[1:]], dim=1).T) - torch.eye(8)
    assert correlation.abs().max() < 5 / math.sqrt(len(stays))


def test_dropout_draws_anew_and_by_the_seed() -> None:
    torch.manual_seed(3)
    first, second = dropout(torch.ones(100), 0.5), dropout(torch.ones(100), 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(torch.ones(100), 0.5), first)
    assert not torch.equal(first, second)


def test_attention_in_training_is_torchs_up_to_what_falls_out(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 7, 8, generator=generator, dtype=torch.float64)
    seen = (torch.rand(2, 1, 7, 7, generator=generator) < 0.5) | torch.eye(7, dtype=torch.bool)
    monkeypatch.setattr("vnaw_pipeline.temporal.dropout", lambda x, probability: x)
    torchs = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    torch.testing.assert_close(attention(query, key, value, seen, 0.5), torchs)
    monkeypatch.undo()
    drawn = torch.stack([attention(query, key, value, seen, 0.5) for _ in range(4000)])
    assert (drawn.mean(dim=0) - torchs).abs().max() < 6 * (drawn.std(dim=0) / math.sqrt(len(drawn))).max()
