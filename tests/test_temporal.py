"""The temporal model: padding never changes a valid frame, causality holds, a window without frames is finite."""

import pytest
import torch

from vnaw_pipeline.config import TemporalConfig
from vnaw_pipeline.temporal import TemporalModel, sinusoidal_positions


def model_of(**values: object) -> TemporalModel:
    torch.manual_seed(0)
    config = TemporalConfig.model_validate({"width": 16, "layers": 2, "heads": 2, "feed_forward": 32, **values})
    return TemporalModel(6, 3, config).eval()


@pytest.mark.parametrize("position", ["none", "sinusoidal"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_padded_window_gives_the_logits_of_the_unpadded_one(position: str, causal: bool) -> None:
    """Tolerance: the same float32 sums in another order."""
    model = model_of(position=position, causal=causal)
    frames = torch.randn(2, 7, 6)
    valid = torch.ones(2, 7, dtype=torch.bool)
    alone = model(frames, valid)
    padded = model(
        torch.cat([frames, torch.randn(2, 5, 6)], dim=1), torch.cat([valid, torch.zeros(2, 5, dtype=torch.bool)], dim=1)
    )
    torch.testing.assert_close(padded[:, :7], alone, rtol=1e-4, atol=1e-5)


def test_an_invalid_frame_is_seen_by_no_other() -> None:
    model = model_of()
    frames, valid = torch.randn(1, 9, 6), torch.ones(1, 9, dtype=torch.bool)
    valid[0, 4] = False
    changed = frames.clone()
    changed[0, 4] += 100
    others = [i for i in range(9) if i != 4]
    torch.testing.assert_close(model(frames, valid)[0, others], model(changed, valid)[0, others])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_inference_gives_what_training_mode_gives(heads: int) -> None:
    """torch runs another, fused path without gradients; it must treat invalid frames alike."""
    model = model_of(heads=heads, dropout=0.0)
    frames, valid = torch.randn(3, 9, 6), torch.rand(3, 9) < 0.6
    with torch.inference_mode():
        fused = model(frames, valid)
    torch.testing.assert_close(fused, model(frames, valid), rtol=1e-4, atol=1e-5)


def test_causal_frames_do_not_see_the_future() -> None:
    frames, valid = torch.randn(1, 9, 6), torch.ones(1, 9, dtype=torch.bool)
    changed = frames.clone()
    changed[0, 5:] += 10
    causal, free = model_of(causal=True), model_of(causal=False)
    torch.testing.assert_close(causal(frames, valid)[0, :5], causal(changed, valid)[0, :5])
    assert not torch.allclose(free(frames, valid)[0, :5], free(changed, valid)[0, :5])


def test_without_positions_the_order_of_frames_does_not_matter() -> None:
    frames, valid = torch.randn(1, 9, 6), torch.ones(1, 9, dtype=torch.bool)
    order = torch.randperm(9)
    plain, placed = model_of(position="none"), model_of(position="sinusoidal")
    torch.testing.assert_close(plain(frames[:, order], valid), plain(frames, valid)[:, order], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(placed(frames[:, order], valid), placed(frames, valid)[:, order], atol=1e-3)


def test_a_window_without_any_frame_is_finite_and_has_finite_gradients() -> None:
    model = model_of().train()
    logits = model(torch.zeros(2, 5, 6), torch.zeros(2, 5, dtype=torch.bool))
    assert torch.isfinite(logits).all()
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_position_codes() -> None:
    codes = sinusoidal_positions(50, 6)
    torch.testing.assert_close(codes[0], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(codes[3, 2], torch.tensor(3 / 10_000 ** (2 / 6)).sin())
