"""Extraction: the numbers are the encoder's, the bytes do not depend on how they were made, faults are rows."""

import hashlib
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath

from vnaw_pipeline.checkpoints import load_tensors, read_header, save_tensors
from vnaw_pipeline.config import EncoderConfig, PipelineConfig, dump_config, load_config
from vnaw_pipeline.crops.source import JpegFolder, decode_crop
from vnaw_pipeline.errors import CheckpointError, ConfigError, StoreError
from vnaw_pipeline.features import encode
from vnaw_pipeline.features import store as store_module
from vnaw_pipeline.features.encode import Chunk
from vnaw_pipeline.features.encoder import Preprocessing, build_encoder, encoder_of_weights, load_encoder
from vnaw_pipeline.features.extract import extract_features, share_of
from vnaw_pipeline.features.store import open_store, what_to_set

from .conftest import DrawnData


def store_digest(path: Path) -> str:
    """Digest of every chunk's name and bytes."""
    sha = hashlib.sha256()
    for view in sorted(entry.name for entry in path.iterdir() if entry.is_dir()):
        for file in sorted((path / view).rglob("*")):
            if file.is_file():
                sha.update(str(file.relative_to(path)).encode())
                sha.update(file.read_bytes())
    return sha.hexdigest()


def test_embeddings_are_those_of_bare_timm(drawn: DrawnData, tiny_config: PipelineConfig, drawn_store: Path) -> None:
    """One image at a time through timm itself, normalised by hand. Tolerance: float16 keeps 11 bits."""
    encoder = tiny_config.encoder
    with torch.random.fork_rng():
        torch.manual_seed(tiny_config.seed)
        bare = timm.create_model(encoder.name, num_classes=0, **encoder.model_args).eval()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    row = drawn.manifest.iloc[0]
    store = open_store(drawn_store)
    valid, embeddings = store.valid(row.video_id), store.embeddings(row.video_id)
    frames = np.flatnonzero(valid)[[0, 5, -1]]
    for frame_index in frames:
        rgb = decode_crop((drawn.crops / row.crops / f"{frame_index + 1:05d}.jpg").read_bytes())
        small = load_encoder(encoder).preprocessing.of_crop(rgb)
        image = torch.from_numpy(((small / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
        with torch.inference_mode():
            wanted = bare(image)[0].numpy()
        np.testing.assert_allclose(embeddings[frame_index], wanted, rtol=2e-3, atol=2e-3)


def test_frames_without_a_crop_are_rows_of_zeros(drawn: DrawnData, drawn_store: Path) -> None:
    store = open_store(drawn_store)
    for row in drawn.manifest.itertuples():
        valid, embeddings = store.valid(row.video_id), store.embeddings(row.video_id)
        there = [(drawn.crops / row.crops / f"{i + 1:05d}.jpg").exists() for i in range(row.num_frames)]
        assert valid.tolist() == there
        assert (embeddings[~valid] == 0).all()
        assert (embeddings[valid] != 0).any(axis=1).all()


def test_bytes_do_not_depend_on_threads_or_on_the_batch_around_a_frame(
    drawn: DrawnData, tiny_config: PipelineConfig, drawn_store: Path, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    config = tiny_config.model_copy(update={"extract": tiny_config.extract.model_copy(update={"decode_threads": 5})})
    report = extract_features(drawn.manifest.iloc[::-1], drawn.crops, tmp_path / "s", config)
    assert report.ok
    assert report.done == len(drawn.manifest)
    assert store_digest(tmp_path / "s") == store_digest(drawn_store)
    assert torch.get_num_threads() == before


def test_crops_are_opened_once_for_chunks_in_a_row_and_closed(
    drawn: DrawnData, tiny_config: PipelineConfig, drawn_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of images is listed when it is opened: once a chunk would be quadratic in a video's length."""
    opened: list[tuple[str, JpegFolder]] = []
    closed: list[JpegFolder] = []

    class Watched(JpegFolder):
        def read(self, start: int, stop: int) -> list[bytes | None]:
            assert self not in closed
            return super().read(start, stop)

        def close(self) -> None:
            closed.append(self)

    def open_watched(crops_root: Path, crops: str) -> JpegFolder:
        opened.append((crops, Watched(crops_root / crops)))
        return opened[-1][1]

    monkeypatch.setattr(encode, "open_listed_crops", open_watched)
    monkeypatch.setattr(store_module, "CHUNK_FRAMES", 16)
    report = extract_features(drawn.manifest, drawn.crops, tmp_path / "s", tiny_config)
    assert report.done > 4 * len(drawn.manifest)
    times = Counter(crops for crops, _ in opened)
    assert times.keys() == set(drawn.manifest.crops)
    assert max(times.values()) <= 2, "whole chunks are made first, then what is left of each video"
    assert sorted(map(id, closed)) == sorted(id(source) for _, source in opened)
    store, wanted = open_store(tmp_path / "s"), open_store(drawn_store)
    for video_id in drawn.manifest.video_id:
        assert (store.embeddings(video_id) == wanted.embeddings(video_id)).all()


def test_a_rerun_does_nothing_and_a_lost_chunk_is_made_again(
    drawn: DrawnData, tiny_config: PipelineConfig, drawn_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(drawn_store, tmp_path / "s")
    lost = drawn.manifest.video_id[1]
    (tmp_path / "s" / "plain" / lost / "c" / "0" / "0").unlink()
    report = extract_features(drawn.manifest, drawn.crops, tmp_path / "s", tiny_config)
    assert (report.done, report.skipped) == (1, len(drawn.manifest) - 1)
    assert store_digest(tmp_path / "s") == store_digest(drawn_store)
    again = extract_features(drawn.manifest, drawn.crops, tmp_path / "s", tiny_config)
    assert (again.done, again.skipped, again.frames) == (0, len(drawn.manifest), 0)


def test_unreadable_crops_are_rows_and_are_tried_again(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    row = drawn.manifest.iloc[[0]]
    crops = tmp_path / "crops" / row.crops.iloc[0]
    shutil.copytree(drawn.crops / row.crops.iloc[0], crops)
    images = sorted(crops.glob("*.jpg"))[:5]
    whole = images[0].read_bytes()
    images[0].write_bytes(whole[: len(whole) // 2])
    images[1].write_bytes(b"")
    images[2].write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    images[3].write_bytes(b"this is text")
    images[4].unlink()
    images[4].mkdir()
    for attempt in range(2):
        report = extract_features(row, tmp_path / "crops", tmp_path / "s", tiny_config)
        assert not report.ok
        status = pd.read_csv(tmp_path / "s" / "status.csv")
        assert status.frame_index.tolist() == [int(image.stem) - 1 for image in images], f"attempt {attempt}"
        for reason, words in zip(
            status.reason, ("cut off", "empty", "PNG", "not a JPEG", "Is a directory"), strict=True
        ):
            assert words in reason
        valid = open_store(tmp_path / "s").valid(row.video_id.iloc[0])
        assert not valid[status.frame_index].any()
    images[4].rmdir()
    for image in images:
        image.write_bytes(whole)
    mended = extract_features(row, tmp_path / "crops", tmp_path / "s", tiny_config)
    assert mended.ok
    assert open_store(tmp_path / "s").valid(row.video_id.iloc[0])[status.frame_index].all()


def test_a_video_without_crops_fails_alone(drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path) -> None:
    """Its frames are not valid, so that the others can be used; it is a row in each run until it has crops."""
    rows = drawn.manifest.iloc[:3].copy()
    config = tiny_config.model_copy(update={"extract": tiny_config.extract.model_copy(update={"crop_set": "x"})})
    for crops, words in (("cropped_aligned/nowhere", "No crops at"), ("", "names no crops")):
        rows.loc[rows.index[0], "crops"] = crops
        report = extract_features(rows, drawn.crops, tmp_path / "s", config)
        assert [(failure.video_id, failure.frame_index) for failure in report.failures] == [(rows.video_id[0], None)]
        assert words in report.failures[0].reason
        store = open_store(tmp_path / "s")
        assert not store.valid(rows.video_id[0]).any()
        assert store.valid(rows.video_id[1]).any()
    mended = extract_features(drawn.manifest.iloc[:3], drawn.crops, tmp_path / "s", config)
    assert (mended.ok, mended.done, mended.skipped) == (True, 1, 2)
    assert open_store(tmp_path / "s").valid(rows.video_id[0]).any()


def test_other_weights_or_settings_are_refused(
    drawn: DrawnData, tiny_config: PipelineConfig, drawn_store: Path
) -> None:
    for change, words in (
        ({"seed": 1}, "weights: found"),
        ({"encoder": tiny_config.encoder.model_copy(update={"mean": (0.5, 0.5, 0.5)})}, "mean: found"),
        (
            {"extract": tiny_config.extract.model_copy(update={"crop_set": "other"})},
            "crops: found 'cropped_aligned'.* --set 'extract.crop_set=\"cropped_aligned\"'",
        ),
        ({"extract": tiny_config.extract.model_copy(update={"precision": "bf16"})}, "precision: found 'fp32'"),
    ):
        with pytest.raises(StoreError, match=words):
            extract_features(drawn.manifest, drawn.crops, drawn_store, tiny_config.model_copy(update=change))


def test_what_to_set_is_said_of_extracted_features_alone() -> None:
    made = {"backend": "torch", "precision": "fp32", "crops": "112 px"}
    assert what_to_set(made, made | {"precision": "bf16"}) == " Here that takes --set extract.precision=fp32."
    assert """--set 'extract.crop_set="112 px"'""" in what_to_set(made, made | {"crops": "own"})
    assert what_to_set(made, {"imported": "tree"}) == what_to_set({"imported": "tree"}, made) == ""


def command(drawn: DrawnData, config: PipelineConfig, store: Path, tmp_path: Path) -> list[str]:
    config_path = tmp_path / "config.yaml"
    config_path.write_text(dump_config(config))
    options = {"--manifest": drawn.manifest_path, "--crops": drawn.crops, "--store": store, "--config": config_path}
    return ["-m", "vnaw_pipeline", "extract", *(str(part) for pair in options.items() for part in pair)]


@pytest.fixture(scope="module")
def views_config(tiny_config: PipelineConfig) -> PipelineConfig:
    views = {"views": ("plain", "mirror", "erase0"), "erase_span_frames": 40}
    return tiny_config.model_copy(update={"extract": tiny_config.extract.model_copy(update=views)})


@pytest.fixture(scope="module")
def views_digest(drawn: DrawnData, views_config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a store with three views that one process made in one go."""
    path = tmp_path_factory.mktemp("views") / "s"
    assert extract_features(drawn.manifest, drawn.crops, path, views_config).ok
    return store_digest(path)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["torch.distributed.run", "--nproc-per-node", "4"], id="torchrun-4"),
        pytest.param(
            [
                "accelerate.commands.accelerate_cli",
                "launch",
                "--multi_gpu",
                "--num_machines",
                "1",
                "--num_processes",
                "2",
            ],
            id="accelerate-2",
        ),
    ],
)
def test_launched_processes_write_the_same_bytes(
    launcher: list[str], drawn: DrawnData, views_config: PipelineConfig, views_digest: str, tmp_path: Path
) -> None:
    """--multi_gpu makes accelerate's launcher start several processes without a GPU too (see the README)."""
    line = [sys.executable, "-m", *launcher, *command(drawn, views_config, tmp_path / "s", tmp_path)]
    finished = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.count("extract: 21 chunks done") == 1
    assert store_digest(tmp_path / "s") == views_digest


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_a_killed_extraction_goes_on(
    seconds: float, drawn: DrawnData, views_config: PipelineConfig, views_digest: str, tmp_path: Path
) -> None:
    process = subprocess.Popen([sys.executable, *command(drawn, views_config, tmp_path / "s", tmp_path)])
    while not (tmp_path / "s" / "valid").exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run must not have ended before the kill"
    (tmp_path / "s" / "valid" / "zarr.0123.partial").write_text("{")  # what a kill in the middle of a write leaves
    assert extract_features(drawn.manifest, drawn.crops, tmp_path / "s", views_config).ok
    assert store_digest(tmp_path / "s") == views_digest


def test_chunks_are_shared_by_frames_and_none_twice() -> None:
    chunks = [Chunk(f"v{i}", 0, length, {"plain": {}}) for i, length in enumerate([1000, 10, 10, 500, 480, 30])]
    shares = [share_of(chunks, index, 2) for index in range(2)]
    assert sorted(c.video_id for share in shares for c in share) == sorted(c.video_id for c in chunks)
    assert [sum(c.stop - c.start for c in share) for share in shares] == [1020, 1010]
    assert share_of(chunks[:1], 1, 2) == []
    two_views = Chunk("w", 0, 600, {"mirror": {}, "erase0": {}})
    assert share_of([*chunks[:1], two_views, Chunk("x", 0, 900, {"plain": {}})], 0, 2) == [two_views]


def test_weights_files_are_checked(tiny_config: PipelineConfig, tmp_path: Path) -> None:
    config = tiny_config.encoder
    good = timm.create_model(config.name, num_classes=8, **config.model_args).state_dict()
    made_for = {"encoder": config.name, "model_args": config.model_args}

    def load(path: Path, allow_pickle: bool = False, **changes: object) -> str:
        return load_encoder(
            config.model_copy(update={"weights": path, **changes}), allow_pickle=allow_pickle
        ).weights_digest

    save_tensors(tmp_path / "ours.safetensors", good, made_for)
    save_file(good, tmp_path / "bare.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in good.items()}}, tmp_path / "foreign.pth")
    assert len({load(tmp_path / "ours.safetensors"), load(tmp_path / "bare.safetensors")}) == 1
    assert load(tmp_path / "foreign.pth", allow_pickle=True) == load(tmp_path / "bare.safetensors")
    assert load_encoder(config).weights_digest != load(tmp_path / "bare.safetensors")

    with pytest.raises(CheckpointError, match="--allow-pickle"):
        load(tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match="is not there"):
        load(tmp_path / "nowhere.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "bare.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="holds another encoder than the config names"):
        load(tmp_path / "ours.safetensors", model_args={**config.model_args, "embed_dim": 16})
    with pytest.raises(CheckpointError, match=r"does not fit .*(?s:.)*the model has"):
        load(tmp_path / "bare.safetensors", model_args={**config.model_args, "embed_dim": 16})


@pytest.mark.parametrize("name", ["fer_lite0", "fer_swin"])
def test_encoders_that_ship_go_on_with_the_dropouts_of_their_configs(name: str) -> None:
    """The files do not record them, as they act in training only; a store of one is a store of the other."""
    configs = Path(__file__).parent.parent / "configs"
    config = load_config(configs / f"{name}.yaml", [f"encoder.weights={name}.safetensors"]).encoder
    assert config.model_args["drop_path_rate"] == 0.1
    model, _, left_out = build_encoder(config, 8)
    assert not left_out, "the head fits too"
    assert any(isinstance(part, DropPath) and part.drop_prob for part in model.modules())
    plain = load_encoder(encoder_of_weights(name))
    assert load_encoder(config).fingerprint() == plain.fingerprint()


def test_weights_bring_their_preprocessing_and_refuse_another(tiny_config: PipelineConfig, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    config = tiny_config.encoder.model_copy(update={"weights": path})
    state = timm.create_model(config.name, num_classes=0, **config.model_args).state_dict()
    recorded = {"mean": [0.5, 0.5, 0.5], "grey": True, "detail_px": 48, "face_region": [0.1, 0.1, 0.9, 0.9]}
    save_tensors(path, state, {"encoder": config.name, "model_args": config.model_args, **recorded})
    found = load_encoder(config).preprocessing
    assert found.mean == (0.5, 0.5, 0.5)
    assert (found.grey, found.detail_px, found.face_region) == (True, 48, (0.1, 0.1, 0.9, 0.9))
    assert found.std == (0.229, 0.224, 0.225), "not recorded: the model's own"
    assert load_encoder(config.model_copy(update={"detail_px": 64})).preprocessing.detail_px == 64
    for change, words in (({"mean": (0.4, 0.5, 0.5)}, r"mean: found \[0.5"), ({"grey": False}, "grey: found True")):
        with pytest.raises(CheckpointError, match=words):
            load_encoder(config.model_copy(update=change))


def test_a_crop_is_cut_greyed_and_freed_of_detail() -> None:
    """On a picture whose left half is red and whose right half is a one-pixel chequer, each step shows."""
    rgb = np.zeros((96, 96, 3), np.uint8)
    rgb[:, :48, 0] = 200
    rgb[:, 48:][np.indices((96, 48)).sum(axis=0) % 2 == 0] = 255
    plain = Preprocessing(input_px=96, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
    assert np.array_equal(plain.of_crop(rgb), rgb)
    assert len(np.unique(replace(plain, grey=True).of_crop(rgb)[:, :48])) == 1, "red has one grey, in all channels"
    smooth = replace(plain, detail_px=48).of_crop(rgb)
    assert smooth.shape == rgb.shape
    assert np.ptp(smooth[:, 60:].astype(int)) <= 1, "the chequer is finer than 48 pixels can show"
    right = replace(plain, face_region=(0.5, 0.0, 1.0, 0.5), input_px=48)
    assert np.array_equal(right.of_crop(rgb), rgb[:48, 48:])
    assert not np.array_equal(right.of_face(rgb), right.of_crop(rgb)), "a picture framed as in training is not cut"


TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
"""ViT-B/16 in all but its sizes."""


def test_a_vit_gives_its_class_token_or_the_mean_of_its_patches() -> None:
    """Taken by hand from the last layer's normalised tokens, whose first is the class token; no weight changes."""
    config = EncoderConfig(name="vit_base_patch16_224", weights="untrained", model_args=TINY_VIT)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bare = timm.create_model(config.name, num_classes=0, **TINY_VIT).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    own, token, mean = (load_encoder(config.model_copy(update={"pool": pool})) for pool in (None, "token", "avg"))
    with torch.inference_mode():
        tokens = bare.forward_features(images)
        assert tokens.shape == (3, 1 + 4 * 4, 16)
        for encoder, wanted in ((own, tokens[:, 0]), (token, tokens[:, 0]), (mean, tokens[:, 1:].mean(dim=1))):
            torch.testing.assert_close(encoder.model(images), wanted)
    assert own.weights_digest == token.weights_digest == mean.weights_digest
    assert [encoder.fingerprint()["pool"] for encoder in (own, token, mean)] == [None, "token", "avg"]


def test_weights_record_how_they_were_pooled(tmp_path: Path) -> None:
    """Null takes the file's way; another way gives other embeddings, to which the file's head does not belong."""
    path = tmp_path / "w.safetensors"
    config = EncoderConfig(name="vit_base_patch16_224", weights=path, model_args=TINY_VIT)
    state = timm.create_model(config.name, num_classes=2, **TINY_VIT).state_dict()
    recorded = {"kind": "encoder", "encoder": config.name, "model_args": TINY_VIT, "outputs": ["a", "b"]}
    save_tensors(path, state, {**recorded, "pool": "avg"})
    assert load_encoder(encoder_of_weights(path)).pool == "avg"
    assert load_encoder(config).head is not None
    token = load_encoder(config.model_copy(update={"pool": "token"}))
    assert (token.pool, token.head) == ("token", None)
    with pytest.raises(ConfigError, match=r"pool 'token' do not fit"):
        load_encoder(EncoderConfig(weights="untrained", pool="token"))


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    """A model is known by the digest of its file."""
    written = set()
    for name in map(str, range(20)):
        save_tensors(
            tmp_path / f"{name}.safetensors", {"a": torch.arange(3.0), "b": torch.ones(2)}, {"kind": "encoder"}
        )
        written.add((tmp_path / f"{name}.safetensors").read_bytes())
    assert len(written) == 1
    assert load_tensors(tmp_path / "0.safetensors")[1] == read_header(tmp_path / "0.safetensors") == {"kind": "encoder"}


def test_damaged_weights_are_named_with_both_digests(tiny_config: PipelineConfig, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"a": torch.arange(1000.0)}, {"kind": "encoder"})
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: its digest is \w{12}, and it was written with \w{12}"):
        load_encoder(tiny_config.encoder.model_copy(update={"weights": path}))


def test_encoders_are_found_by_name_with_their_head() -> None:
    """The head on the embedding gives the logits of the whole timm model with the same weights."""
    config = encoder_of_weights("drawn_swin")
    encoder = load_encoder(config)
    whole, preprocessing, _ = build_encoder(config, len(encoder.outputs))
    assert preprocessing == encoder.preprocessing
    assert encoder.head is not None
    images = torch.rand(2, 3, preprocessing.input_px, preprocessing.input_px)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.head(encoder.model(images)), whole.eval()(images))
    with pytest.raises(CheckpointError, match=r"'nonsense': not a file, and not one that ships \(.*drawn_swin"):
        encoder_of_weights("nonsense")


def test_embeddings_that_float16_cannot_hold_are_an_error(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    config = tiny_config.encoder
    state = timm.create_model(config.name, num_classes=0, **config.model_args).state_dict()
    state = {name: value * 1e6 if name.startswith("norm.") else value for name, value in state.items()}
    save_tensors(tmp_path / "w.safetensors", state, {})
    encoder = config.model_copy(update={"weights": tmp_path / "w.safetensors"})
    with pytest.raises(StoreError, match="float16 cannot hold"):
        extract_features(
            drawn.manifest, drawn.crops, tmp_path / "s", tiny_config.model_copy(update={"encoder": encoder})
        )


def test_an_untrained_encoder_says_so(tiny_config: PipelineConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_encoder(tiny_config.encoder)
    assert "UNTRAINED" in caplog.text


def test_unknown_encoders_and_missing_downloads_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not a timm model"):
        load_encoder(EncoderConfig(name="swin_tinny", weights="untrained"))
    for wrong in ({"no_such_argument": 1}, {"num_heads": [3]}, {"depths": [2, 2, 2, 2, 2]}):
        with pytest.raises(ConfigError, match=r"model_args .* (do not fit|cannot take)|cannot take images"):
            load_encoder(EncoderConfig(weights="untrained", model_args=wrong))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="could not be downloaded"):
        load_encoder(EncoderConfig(weights="pretrained"))
