"""What training does to images, and the average it keeps of a model's weights."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vnaw_pipeline.config import EncoderConfig, PipelineConfig
from vnaw_pipeline.errors import CheckpointError
from vnaw_pipeline.features.encoder import Preprocessing, build_encoder, parameter_groups, take_over_outputs
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.training.images import erase_rectangles, vary_images
from vnaw_pipeline.training.loop import _train_mode, fit, move_average

from .test_training import optimisation, regression

COUNT, SIDE = 400, 48


def slopes(values: Tensor) -> Tensor:
    """Slopes along x and y of each image, (B, 2), by least squares over the middle, away from the borders."""
    middle = slice(SIDE // 4, -SIDE // 4)
    axis = (2 * torch.arange(SIDE) + 1) / SIDE - 1
    y, x = torch.meshgrid(axis[middle], axis[middle], indexing="ij")
    design = torch.stack([x.flatten(), y.flatten(), torch.ones(x.numel())], dim=1).double()
    return torch.linalg.lstsq(design, values[:, middle, middle].flatten(1).T.double()).solution[:2].T


def test_images_are_mirrored_turned_scaled_and_relit_a_little() -> None:
    """A ramp stays a ramp: its slopes show mirror, angle and scale (PyTorch's cubic bends it by half a percent)."""
    torch.manual_seed(0)
    axis = (2 * torch.arange(SIDE) + 1) / SIDE - 1
    along_x, along_y = axis.expand(SIDE, SIDE), axis[:, None].expand(SIDE, SIDE)
    images = torch.stack([along_x, along_y, torch.zeros(SIDE, SIDE)]).expand(COUNT, 3, SIDE, SIDE)
    varied = vary_images(images)
    of_x, of_y = slopes(varied[:, 0]), slopes(varied[:, 1])
    mirrored = of_x[:, 0] < 0
    assert 0.42 < mirrored.double().mean() < 0.58
    sign = torch.where(mirrored, -1.0, 1.0)
    torch.testing.assert_close(of_y[:, 1], of_x[:, 0] * sign, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(of_y[:, 0], -of_x[:, 1] * sign, rtol=1e-2, atol=1e-2)
    angle = torch.atan2(-of_x[:, 1], of_x[:, 0].abs())
    assert angle.abs().max() <= 0.205
    assert angle.std() == pytest.approx(0.2 / math.sqrt(3), rel=0.15)
    size = of_x.norm(dim=1)  # scale times contrast
    assert 0.87 * 0.7 <= size.min() < size.max() <= 1.13 * 1.3
    brightness = varied[:, 2, SIDE // 2, SIDE // 2]
    assert 0.35 < brightness.abs().max() <= 0.4


def test_erased_rectangles_have_the_asked_area_and_share() -> None:
    torch.manual_seed(0)
    erased = (erase_rectangles(torch.ones(COUNT, 3, SIDE, SIDE), 0.25) == 0).all(dim=1)
    share = erased.double().mean(dim=(1, 2))
    assert 0.18 < (share > 0).double().mean() < 0.32
    assert share.max() < 0.25, "20%, and what pixels at the edge add"
    assert not erase_rectangles(torch.ones(COUNT, 3, SIDE, SIDE), 0.0).eq(0).any()


def test_an_average_of_weights_leaves_a_bad_start_and_keeps_whole_numbers(tiny_config: PipelineConfig) -> None:
    """PyTorch's own average rounds a Swin's table of positions down, for .9 among others."""
    model, _, _ = build_encoder(tiny_config.encoder, 8)
    average, _, _ = build_encoder(tiny_config.encoder, 8, seed=1)
    weight = average.get_parameter("head.fc.weight").detach().clone().double()
    for step in range(30):
        with torch.no_grad():
            model.get_parameter("head.fc.weight").add_(0.01)
        move_average(average, model, 0.9, step)
        share = max(1 - 0.9, 9 / (10 + step))
        weight += share * (model.get_parameter("head.fc.weight").detach().double() - weight)
    torch.testing.assert_close(average.get_parameter("head.fc.weight").double(), weight, rtol=1e-5, atol=1e-6)
    tables = [(name, kept) for name, kept in average.named_buffers() if not kept.is_floating_point()]
    assert tables, "a Swin has them"
    for name, kept in tables:
        assert torch.equal(kept, model.get_buffer(name))
    bias = nn.Linear(1, 1)
    started = nn.Linear(1, 1)
    nn.init.constant_(bias.weight, 0.0)
    nn.init.constant_(started.weight, 1.0)
    for step in range(64):
        move_average(started, bias, 0.998, step)
    assert started.weight.item() < 1e-3, "without a warm-up .88 of the start would be left"


def test_a_frozen_block_is_still() -> None:
    """Also what has no weights of its own in it, such as dropped paths."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Linear(4, 2), nn.Dropout(0.5))
    model[0].requires_grad_(False)
    _train_mode(model)
    assert [module.training for module in model.modules()] == [True, False, False, False, True, True]


def test_norms_and_biases_do_not_decay(tiny_config: PipelineConfig) -> None:
    for layer_decay in (1.0, 0.9):
        model, _, _ = build_encoder(tiny_config.encoder, 8)
        names = {id(weight): name for name, weight in model.named_parameters()}
        groups = parameter_groups(model, 0.05, layer_decay, 0)
        decays = {names[id(weight)]: group["weight_decay"] for group in groups for weight in group["params"]}
        assert len(decays) == len(names)
        still = {name for name, decay in decays.items() if decay == 0}
        assert {name for name, weight in model.named_parameters() if weight.ndim == 1} <= still
        assert any("relative_position_bias_table" in name for name in still)
        assert "head.fc.weight" not in still


def test_a_teacher_sees_colours_and_detail_as_it_was_trained_on() -> None:
    """Against its own preprocessing of the same picture; a smooth one, for which ways of resizing agree."""
    given = Preprocessing(input_px=64, mean=(0.48, 0.45, 0.4), std=(0.2, 0.3, 0.25), interpolation="bicubic")
    own = Preprocessing(input_px=32, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", grey=True, detail_px=16)
    noise = np.random.default_rng(0).random((8, 8, 3)) * 255
    picture = cv2.resize(noise, (64, 64), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    found = own.from_normalised(given.normalise(torch.from_numpy(picture)[None]), given)
    wanted = own.normalise(torch.from_numpy(own.of_face(picture))[None])
    assert found.shape == wanted.shape
    assert torch.equal(found[:, 0], found[:, 2])
    assert (found - wanted).abs().mean() < 0.03
    colour = Preprocessing(input_px=64, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    kept = colour.from_normalised(given.normalise(torch.from_numpy(picture)[None]), given)
    torch.testing.assert_close(kept, colour.normalise(torch.from_numpy(picture)[None]), rtol=1e-4, atol=1e-5)


def test_a_head_is_taken_over_into_a_wider_one() -> None:
    config = EncoderConfig(name="test_efficientnet", weights="untrained")
    narrow, wide = (build_encoder(config, outputs, seed)[0] for outputs, seed in ((8, 0), (20, 1)))
    left_out = {f"classifier.{key}": value for key, value in narrow.get_submodule("classifier").state_dict().items()}
    before = wide.get_parameter("classifier.weight").detach().clone()
    take_over_outputs(wide, left_out, 8)
    assert torch.equal(wide.get_parameter("classifier.weight")[:8], narrow.get_parameter("classifier.weight"))
    assert torch.equal(wide.get_parameter("classifier.weight")[8:], before[8:])


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    recipe, _ = regression()
    folder = RunFolder(tmp_path)
    fit(recipe, optimisation(1), folder)
    recipe, _ = regression()
    with pytest.raises(CheckpointError, match="not written by this version"):
        fit(recipe, optimisation(2, ema_decay=0.5), folder)
