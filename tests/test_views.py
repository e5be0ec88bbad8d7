"""Views: exactly what is said is flipped or erased, and a store comes out the same however its views were made."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vnaw_pipeline.config import PipelineConfig, load_config
from vnaw_pipeline.crops.source import decode_crop
from vnaw_pipeline.errors import ConfigError, StoreError
from vnaw_pipeline.features.bank import open_bank
from vnaw_pipeline.features.encoder import load_encoder
from vnaw_pipeline.features.extract import extract_features
from vnaw_pipeline.features.store import open_store
from vnaw_pipeline.features.views import PLAIN, erased_pixels, frames_in_view, view_recipes

from .conftest import DrawnData

ALL = ("plain", "mirror", "erase0", "erase1")
RECIPES = view_recipes(ALL, span_frames=100, seed=0)


@pytest.mark.parametrize("side", [224, 112, 37, 10])
def test_exactly_a_fifth_of_the_pixels_is_erased(side: int) -> None:
    erased = erased_pixels(RECIPES["erase0"], "v", "erase0", 3, side)
    assert erased.shape == (side, side)
    assert erased.sum() == round(0.2 * side * side)


def test_whole_blocks_are_erased_but_one() -> None:
    """10035.2 of 224 x 224 pixels: 39 blocks of 256, and 51 pixels of one more."""
    erased = erased_pixels(RECIPES["erase0"], "v", "erase0", 0, 224)
    in_block = erased.reshape(14, 16, 14, 16).sum(axis=(1, 3))
    assert sorted(in_block[in_block > 0].tolist()) == [51, *[256] * 39]


def test_a_span_has_one_mask_and_the_next_another() -> None:
    frames = np.zeros((12, 32, 32, 3), np.uint8)
    _, erased = frames_in_view("erase0", RECIPES["erase0"], frames, "v", 95)
    assert erased is not None
    assert (erased[:5] == erased[0]).all()
    assert (erased[5:] == erased[5]).all()
    assert (erased[0] != erased[5]).any()
    _, from_97 = frames_in_view("erase0", RECIPES["erase0"], frames, "v", 97)
    assert from_97 is not None
    assert (from_97[:10] == erased[2:]).all(), "where a batch begins changes nothing"


def test_masks_differ_by_seed_video_view_and_span() -> None:
    other_seed = view_recipes(("erase0",), 100, 1)["erase0"]
    masks = [
        erased_pixels(RECIPES["erase0"], "v", "erase0", 0, 64),
        erased_pixels(other_seed, "v", "erase0", 0, 64),
        erased_pixels(RECIPES["erase0"], "w", "erase0", 0, 64),
        erased_pixels(RECIPES["erase0"], "v", "erase1", 0, 64),
        erased_pixels(RECIPES["erase0"], "v", "erase0", 1, 64),
    ]
    assert len({mask.tobytes() for mask in masks}) == len(masks)


def test_masks_stay_the_same_for_good() -> None:
    """A chunk that is made years after its neighbours must fit them; so must one that another machine makes."""
    mask = erased_pixels(RECIPES["erase0"], "14-30-1920x1080", "erase0", 7, 112)
    assert hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16] == "2a41bad3d1b5963b"


def test_the_mirror_of_the_mirror_is_plain() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    once, none_erased = frames_in_view("mirror", RECIPES["mirror"], frames, "v", 0)
    assert none_erased is None
    assert (once[0, :, 0] == frames[0, :, -1]).all()
    assert (frames_in_view("mirror", RECIPES["mirror"], once, "v", 0)[0] == frames).all()


def with_views(config: PipelineConfig, *views: str, **extract: object) -> PipelineConfig:
    return config.model_copy(
        update={"extract": config.extract.model_copy(update={"views": (PLAIN, *views), **extract})}
    )


@pytest.fixture(scope="module")
def viewed(drawn: DrawnData, tiny_config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos in all four views, made at once; spans of 40 frames."""
    path = tmp_path_factory.mktemp("views") / "s"
    config = with_views(tiny_config, *ALL[1:], erase_span_frames=40)
    report = extract_features(drawn.manifest[:2], drawn.crops, path, config)
    assert (report.ok, report.done, report.skipped) == (True, 8, 0)
    return path


def chunk_bytes(store: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(store)): file.read_bytes()
        for folder in ("valid", *ALL)
        for file in sorted((store / folder).glob("*/c/**/*"))
        if file.is_file()
    }


def test_views_are_encodings_of_images_changed_by_hand(
    drawn: DrawnData, tiny_config: PipelineConfig, viewed: Path
) -> None:
    """One frame at a time. Tolerance: float16 keeps 11 bits."""
    encoder, store, row = load_encoder(tiny_config.encoder), open_store(viewed), drawn.manifest.iloc[0]
    valid = np.flatnonzero(store.valid(row.video_id))
    for frame_index in (int(valid[0]), int(valid[valid >= 40][0])):
        crop = decode_crop((drawn.crops / row.crops / f"{frame_index + 1:05d}.jpg").read_bytes())
        image = encoder.preprocessing.normalise(torch.from_numpy(encoder.preprocessing.of_crop(crop)[None]))
        by_hand = {PLAIN: image, "mirror": image.flip(3)}
        for view in ("erase0", "erase1"):
            mask = erased_pixels(store.views[view], row.video_id, view, frame_index // 40, image.shape[-1])
            by_hand[view] = image * torch.from_numpy(~mask)
        for view, changed in by_hand.items():
            wanted = encoder.model(changed)[0].numpy()
            np.testing.assert_allclose(store.embeddings(row.video_id, view)[frame_index], wanted, rtol=2e-3, atol=2e-3)
    plain = store.embeddings(row.video_id)
    assert all((store.embeddings(row.video_id, view) != plain).any() for view in ALL[1:])


def test_views_added_later_are_the_same_and_plain_is_not_made_again(
    drawn: DrawnData, tiny_config: PipelineConfig, viewed: Path, tmp_path: Path
) -> None:
    rows, path = drawn.manifest[:2], tmp_path / "s"
    assert extract_features(rows, drawn.crops, path, tiny_config).done == 2
    before = open_store(path).fingerprint
    plain = path / "plain" / rows.video_id[0] / "c" / "0" / "0"
    made_at = plain.stat().st_mtime_ns
    with pytest.raises(StoreError, match="has no view 'mirror', only plain"):
        open_bank(open_store(path), shown=False, views=("mirror",))
    report = extract_features(rows, drawn.crops, path, with_views(tiny_config, *ALL[1:], erase_span_frames=40))
    assert (report.ok, report.done, report.skipped) == (True, 6, 2)
    assert plain.stat().st_mtime_ns == made_at
    assert open_store(path).fingerprint == before, "a run trained before goes on fitting the store"
    assert chunk_bytes(path) == chunk_bytes(viewed)
    again = extract_features(rows, drawn.crops, path, tiny_config)
    assert (again.done, again.skipped) == (0, 2)


def test_a_lost_chunk_of_a_view_is_made_again(
    drawn: DrawnData, tiny_config: PipelineConfig, viewed: Path, tmp_path: Path
) -> None:
    rows, path = drawn.manifest[:2], tmp_path / "s"
    shutil.copytree(viewed, path)
    (path / "erase1" / rows.video_id[0] / "c" / "0" / "0").unlink()
    (path / "plain" / rows.video_id[1] / "c" / "0" / "0").unlink()
    with pytest.raises(StoreError, match="lacks 1 of 2 videos in view 'erase1'"):
        open_store(path).require(list(rows.video_id), ["erase1"])
    report = extract_features(rows, drawn.crops, path, with_views(tiny_config, "erase1", erase_span_frames=40))
    assert (report.done, report.skipped) == (5, 1), "with plain, every view of the chunk: its crops may be others"
    assert chunk_bytes(path) == chunk_bytes(viewed)


def test_another_recipe_is_refused(drawn: DrawnData, tiny_config: PipelineConfig, viewed: Path) -> None:
    with pytest.raises(StoreError, match=r"View 'erase0' .* span_frames: found 40, wanted 100"):
        extract_features(drawn.manifest[:2], drawn.crops, viewed, with_views(tiny_config, "erase0"))
    assert extract_features(drawn.manifest[:2], drawn.crops, viewed, with_views(tiny_config, "mirror")).skipped == 4


def test_a_view_is_not_added_where_crops_have_gone(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    """And what was extracted from them stays; when they are back, the rest is made."""
    row, path = drawn.manifest[:1], tmp_path / "s"
    crops = tmp_path / "crops" / row.crops[0]
    shutil.copytree(drawn.crops / row.crops[0], crops)
    assert extract_features(row, tmp_path / "crops", path, tiny_config).ok
    before = chunk_bytes(path)
    gone, frame_index = sorted(crops.glob("*.jpg"))[3], int(sorted(crops.glob("*.jpg"))[3].stem) - 1
    content = gone.read_bytes()
    gone.unlink()
    for _ in range(2):
        report = extract_features(row, tmp_path / "crops", path, with_views(tiny_config, "mirror"))
        assert (report.done, [failure.frame_index for failure in report.failures]) == (0, [frame_index])
        assert "not there any more" in report.failures[0].reason
        assert chunk_bytes(path) == before
    gone.write_bytes(content)
    mended = extract_features(row, tmp_path / "crops", path, with_views(tiny_config, "mirror"))
    assert (mended.ok, mended.done) == (True, 1)
    assert open_store(path).embeddings(row.video_id[0], "mirror").any()


def test_a_mended_crop_changes_every_view_that_the_store_has(
    drawn: DrawnData, tiny_config: PipelineConfig, viewed: Path, tmp_path: Path
) -> None:
    """Also those that this run does not ask for: a frame is valid in all of them or in none."""
    row, path = drawn.manifest[:1], tmp_path / "s"
    shutil.copytree(drawn.crops / row.crops[0], tmp_path / "crops" / row.crops[0])
    image = sorted((tmp_path / "crops" / row.crops[0]).glob("*.jpg"))[3]
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    config = with_views(tiny_config, *ALL[1:], erase_span_frames=40)
    assert not extract_features(row, tmp_path / "crops", path, config).ok
    frame_index = int(image.stem) - 1
    assert not any(open_store(path).embeddings(row.video_id[0], view)[frame_index].any() for view in ALL)
    image.write_bytes(whole)
    assert extract_features(row, tmp_path / "crops", path, tiny_config).ok
    wanted = chunk_bytes(viewed)
    assert chunk_bytes(path) == {name: wanted[name] for name in wanted if row.video_id[0] in name}


def test_the_bank_holds_the_views_asked_for(viewed: Path) -> None:
    store = open_store(viewed)
    bank = open_bank(store, shown=False, views=("erase1", "mirror"))
    assert set(bank.other_views) == {"erase1", "mirror"}
    for view in (PLAIN, "erase1", "mirror"):
        wanted = np.concatenate([store.embeddings(video_id, view) for video_id in bank.video_ids])
        assert (bank.view(view)[:-1].numpy() == wanted).all()
        assert not bank.view(view)[bank.zero_row].any()
    assert open_bank(store, shown=False).other_views == {}


@pytest.mark.parametrize("views", [["mirror"], ["plain", "plain"], ["plain", "flip"], ["plain", "erase01"], []])
def test_views_that_make_no_sense_are_refused(views: list[str]) -> None:
    with pytest.raises(ConfigError, match="extract"):
        load_config(None, [f"extract.views={views}"])
