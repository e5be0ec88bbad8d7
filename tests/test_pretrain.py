"""Pre-training on static faces: it learns, goes on, hears every config value, and its weights serve every consumer."""

import json
import logging
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vnaw_pipeline.checkpoints import load_tensors, save_tensors
from vnaw_pipeline.cli import app
from vnaw_pipeline.config import EncoderConfig, PipelineConfig, dump_config
from vnaw_pipeline.errors import CheckpointError, ConfigError, DataError
from vnaw_pipeline.facesets.read import read_faces
from vnaw_pipeline.features.encoder import Preprocessing, build_encoder, encoder_of_weights, load_encoder
from vnaw_pipeline.prediction.faces import evaluate_faces
from vnaw_pipeline.tasks import EXPRESSIONS
from vnaw_pipeline.training import faces as training
from vnaw_pipeline.training.faces import LabelledFaces, pretrain_encoder
from vnaw_pipeline.training.images import erase_rectangles, label_objective, read_ahead

FACES = 48


@pytest.fixture(scope="module")
def faces_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 grey images whose brightness tells the class; a tie, and a face that most call unknown, among them."""
    generator = np.random.default_rng(0)
    classes = np.arange(FACES) % 8
    noise = generator.integers(0, 20, (FACES, 48, 48))
    votes = np.zeros((FACES, 10), np.uint8)
    votes[np.arange(FACES), classes] = 8
    votes[np.arange(FACES), (classes + 1) % 8] = 2
    votes[0, :2] = 5
    votes[1, 8] = 9
    path = tmp_path_factory.mktemp("faces") / "faces.npz"
    np.savez(
        path,
        image=(classes[:, None, None] * 30 + noise).astype(np.uint8),
        name=np.array([f"face{i:02d}" for i in range(FACES)]),
        votes=votes,
        fer2013_label=np.array([6, 3, 5, 4, 0, 1, 6, -1] * 6, np.int8),
    )
    return path


@pytest.fixture(scope="module")
def face_config(tiny_config: PipelineConfig) -> PipelineConfig:
    values = tiny_config.model_dump()
    values["encoder"] |= {"grey": True, "detail_px": 24, "face_region": (0.1, 0.1, 0.9, 0.9)}
    values["pretrain"] |= {
        "epochs": 3,
        "batch_faces": 16,
        "learning_rate": 3e-3,
        "ema_decay": 0.5,
        "vary_images": False,
    }
    return PipelineConfig.model_validate(values)


def changed(config: PipelineConfig, **values: Any) -> PipelineConfig:
    merged = config.model_dump()
    merged["pretrain"] |= values
    return PipelineConfig.model_validate(merged)


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_its_weights_serve_scoring_and_extraction(
    faces_file: Path, face_config: PipelineConfig, tmp_path: Path
) -> None:
    report = pretrain_encoder([faces_file], [faces_file], tmp_path / "run", changed(face_config, epochs=60))
    best = tmp_path / "run" / "checkpoint" / "best.safetensors"
    found = evaluate_faces(best, faces_file)
    assert found.scores.accuracy > 0.8, "brightness is easy"
    assert found.scores.num_frames == FACES - 2, "a tie and an unknown face are left out"
    rows = history(tmp_path / "run")
    assert found.scores.macro_f1 == pytest.approx(max(row["macro_f1"] for row in rows), abs=0.05), "bf16 may differ"
    assert report.frames == 60 * (FACES - 2)
    encoder = load_encoder(encoder_of_weights(best))
    assert encoder.outputs == EXPRESSIONS
    wanted = Preprocessing(
        input_px=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic",
        grey=True, detail_px=24, face_region=(0.1, 0.1, 0.9, 0.9),
    )  # fmt: skip
    assert encoder.preprocessing == wanted
    as_json = found.as_json()
    assert set(as_json) >= {"accuracy", "macro_f1", "per_class", "num_faces", "frames_per_second"}
    assert as_json["per_class"]["Neutral"]["num_faces"] == 5


def test_a_hybrid_learns_but_for_its_stem(faces_file: Path, face_config: PipelineConfig, tmp_path: Path) -> None:
    arguments = {"img_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    encoder = EncoderConfig(name="swin_hybrid", weights="untrained", model_args=arguments)
    config = face_config.model_copy(update={"encoder": encoder})
    before = build_encoder(encoder, 8, config.seed)[0].state_dict()
    pretrain_encoder([faces_file], [faces_file], tmp_path / "run", config)
    trained = encoder.model_copy(update={"weights": tmp_path / "run" / "checkpoint" / "best.safetensors"})
    after = build_encoder(trained, 8)[0].state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert not [key for key in changed if key.startswith("patch_embed.backbone")], "weights and running statistics"
    assert {"patch_embed.proj.weight", "head.fc.weight"} <= changed


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv4_conv_small_050", "vit_tiny_patch16_224"])
def test_a_new_head_does_not_begin_sure_of_itself(name: str) -> None:
    args = {"img_size": 64} if name.startswith("vit") else {}
    model, _, _ = build_encoder(EncoderConfig(name=name, weights="untrained", model_args=args), 8)
    with torch.no_grad():
        logits = model.train()(torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(16) % 8)
    assert loss == pytest.approx(math.log(8), abs=0.3), "of the two convolutional models timm's own head has 6 to 7"


@pytest.mark.parametrize("values", [{}, {"loss": {"objective": "elr"}}], ids=["average", "memory"])
def test_a_run_that_goes_on_has_the_same_losses(
    values: dict[str, Any], faces_file: Path, face_config: PipelineConfig, tmp_path: Path
) -> None:
    config = changed(face_config, **values, vary_images=True)
    pretrain_encoder([faces_file], [faces_file], tmp_path / "whole", config)
    stopped, real = tmp_path / "stopped", LabelledFaces.read
    calls = 0

    def stop_in_the_second_epoch(self: LabelledFaces, chosen: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls > 10:  # three are read before; an epoch reads three to learn from and three to score
            raise KeyboardInterrupt
        return real(self, chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LabelledFaces, "read", stop_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            pretrain_encoder([faces_file], [faces_file], stopped, config)
    assert len(history(stopped)) == 1
    report = pretrain_encoder([faces_file], [faces_file], stopped, config)
    assert (report.done, report.skipped) == (2, 1)
    for row, other in zip(history(tmp_path / "whole"), history(stopped), strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    whole, again = (load_tensors(run / "checkpoint" / "last.safetensors")[0] for run in (tmp_path / "whole", stopped))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert any(key.startswith("average.") for key in whole)


VALUES: list[dict[str, Any]] = [
    {"label_source": "single"},
    {"label_source": "majority"},
    {"loss": {"objective": "focal"}},
    {"loss": {"objective": "focal", "focal_gamma": 1.0}},
    {"loss": {"objective": "gce"}},
    {"loss": {"objective": "gce", "gce_q": 0.2}},
    {"loss": {"objective": "elr"}},
    {"loss": {"objective": "elr", "elr_weight": 1.0}},
    {"loss": {"objective": "bootstrap"}},
    {"loss": {"objective": "bootstrap", "bootstrap_beta": 0.5}},
    {"loss": {"weighting": "class"}, "label_source": "single", "sampling": "uniform"},
    {"loss": {"weighting": "complement"}, "label_source": "single", "sampling": "uniform"},
    {"loss": {"weighting": "naw"}},
    {"loss": {"weighting": "naw", "preset": "public-code"}},
    {"loss": {"weighting": "naw", "normalised": False}},
    {"loss": {"weighting": "naw", "weights_carry_gradient": True}},
    {"loss": {"weighting": "naw", "lam_a": 0.0}},
    {"loss": {"weighting": "naw", "mix": "one-plus"}},
    {"loss": {"weighting": "naw", "naw_from": 0.5}},
    {"loss": {"transition": (0.1 / 7 + (0.9 - 0.1 / 7) * np.eye(8)).tolist()}},
    {"loss": {"consistency": 0.3}},
    {"loss": {"label_smoothing": 0.2}},
    {"sampling": "square-root"},
    {"sampling": "uniform"},
    {"vary_images": True},
    {"erase_probability": 0.0},
    {"batch_faces": 8},
    {"learning_rate": 1e-3},
    {"weight_decay": 0.5},
    {"warmup_share": 0.5},
    {"precision": "bf16"},
]


def test_every_value_changes_the_training(faces_file: Path, face_config: PipelineConfig, tmp_path: Path) -> None:
    faces = read_faces(faces_file, "train")
    seen: dict[tuple[float, ...], Any] = {}
    for number, values in enumerate([{}, *VALUES]):
        config = changed(face_config, **{"epochs": 2, **values})
        pretrain_encoder(faces, faces, tmp_path / str(number), config)
        losses = tuple(row["train_loss"] for row in history(tmp_path / str(number)))
        assert all(np.isfinite(losses))
        assert losses not in seen, f"{values} trains like {seen.get(losses)}"
        seen[losses] = values
    plain = tmp_path / "0" / "checkpoint" / "last.safetensors"
    pretrain_encoder(faces, faces, tmp_path / "none", changed(face_config, epochs=2, ema_decay=None))
    tensors, _ = load_tensors(tmp_path / "none" / "checkpoint" / "last.safetensors")
    assert not any(key.startswith("average.") for key in tensors)
    assert torch.equal(tensors["model.head.fc.bias"], load_tensors(plain)[0]["model.head.fc.bias"])


def test_problems_of_all_sets_are_named_together(face_config: PipelineConfig, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    np.savez(tmp_path / "c.npz", image=np.zeros(3))
    with pytest.raises(DataError) as raised:
        pretrain_encoder([tmp_path / "a", tmp_path / "c.npz"], [tmp_path / "b"], tmp_path / "run", face_config)
    assert all(f"{tmp_path / name} " in str(raised.value) for name in ("a", "b", "c.npz"))


def test_random_weights_are_said(
    faces_file: Path, face_config: PipelineConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert face_config.encoder.weights == "untrained"
    faces = read_faces(faces_file, "train")
    with caplog.at_level(logging.WARNING):
        pretrain_encoder(faces, faces, tmp_path / "run", changed(face_config, epochs=1))
    assert "UNTRAINED" in caplog.text


def test_a_student_is_drawn_to_its_teacher(faces_file: Path, face_config: PipelineConfig, tmp_path: Path) -> None:
    """With nothing but the teacher to learn from, the student's predictions come nearer to the teacher's."""
    faces = read_faces(faces_file, "train")
    pretrain_encoder(faces, faces, tmp_path / "teacher", changed(face_config, epochs=60))
    weights = tmp_path / "teacher" / "checkpoint" / "best.safetensors"
    other = face_config.model_copy(
        update={"seed": 5, "encoder": face_config.encoder.model_copy(update={"mean": (0.5, 0.5, 0.5)})}
    )
    taught = changed(other, epochs=60, teacher=weights, teacher_share=1.0, label_source="single")
    pretrain_encoder(faces, faces, tmp_path / "student", taught)
    accuracies = [row["accuracy"] for row in history(tmp_path / "student")]
    assert max(accuracies) > 0.6, "the single labels of this set are shuffled; only the teacher knows"
    bare = tmp_path / "bare.safetensors"
    tensors, header = load_tensors(weights)
    save_tensors(bare, {key: value for key, value in tensors.items() if not key.startswith("head.fc")}, header)
    with pytest.raises(ConfigError, match="no head for the eight expressions"):
        pretrain_encoder(faces, faces, tmp_path / "x", changed(face_config, teacher=bare))
    with pytest.raises(CheckpointError, match="no head for the eight expressions"):
        evaluate_faces(bare, faces)


def test_a_face_that_cannot_be_read_is_not_learnt_from_a_teacher_either(
    faces_file: Path, face_config: PipelineConfig, tmp_path: Path
) -> None:
    """It is a black image in its batch, and a teacher has an answer to that too."""
    faces = read_faces(faces_file, "train")
    pretrain_encoder(faces, faces, tmp_path / "teacher", changed(face_config, epochs=1))
    weights = tmp_path / "teacher" / "checkpoint" / "best.safetensors"
    config = changed(face_config, teacher=weights, teacher_share=1.0, vary_images=False, erase_probability=0.0)
    model, preprocessing, _ = build_encoder(config.encoder, len(EXPRESSIONS), seed=3)
    images = LabelledFaces(faces, faces.targets("majority"), preprocessing).read(torch.arange(4))
    unreadable = torch.tensor([False, True, True, False])
    batch = images._replace(targets=images.targets.masked_fill(unreadable[:, None], 0))
    objective = partial(
        training._objective,
        preprocessing,
        config.pretrain,
        training._load_teacher(weights, 0),
        label_objective(config.pretrain.loss, images.targets),
        model.eval(),
    )
    readable = type(batch)(*(part[~unreadable] for part in batch))
    (of_all, count), (of_readable, wanted) = objective(batch, 0.0), objective(readable, 0.0)
    assert int(count) == int(wanted) == 2
    torch.testing.assert_close(of_all, of_readable)


def test_a_rerun_of_a_finished_training_leaves_what_was_recorded(
    faces_file: Path, face_config: PipelineConfig, tmp_path: Path
) -> None:
    faces = read_faces(faces_file, "train")
    kept = [tmp_path / "run" / name for name in ("record.json", "status.csv")]
    times = []
    for done in (1, 0):
        assert pretrain_encoder(faces, faces, tmp_path / "run", changed(face_config, epochs=1)).done == done
        times.append([path.stat().st_mtime_ns for path in kept])
    assert times[0] == times[1]


def test_a_run_goes_on_that_did_not_record_which_recordings_it_knows(
    faces_file: Path, face_config: PipelineConfig, tmp_path: Path
) -> None:
    """As earlier ones did not; most know none."""
    faces, last = read_faces(faces_file, "train"), tmp_path / "run" / "checkpoint" / "last.safetensors"
    config = changed(face_config, epochs=1)
    pretrain_encoder(faces, faces, tmp_path / "run", config)
    tensors, header = load_tensors(last)
    save_tensors(last, tensors, {key: value for key, value in header.items() if key != "learnt_from"})
    assert pretrain_encoder(faces, faces, tmp_path / "run", config).skipped == 1


def test_a_transition_of_another_size_is_refused(faces_file: Path, face_config: PipelineConfig, tmp_path: Path) -> None:
    faces = read_faces(faces_file, "train")
    config = changed(face_config, loss={"transition": [[1.0]]})
    with pytest.raises(ConfigError, match="a transition of 1 classes, and there are 8"):
        pretrain_encoder(faces, faces, tmp_path / "run", config)


def test_two_processes_give_the_losses_of_one(faces_file: Path, face_config: PipelineConfig, tmp_path: Path) -> None:
    """The gradient is the mean over all images of a step; float32 sums in another order, hence the tolerance."""
    config = changed(face_config, epochs=2, erase_probability=0.0, loss={"consistency": 0.4})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    pretrain_encoder([faces_file], [faces_file], tmp_path / "one", config)
    arguments = ["pretrain", "--faces", faces_file, "--validation", faces_file, "--run-dir", tmp_path / "two"]
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vnaw_pipeline", *arguments]
    done = subprocess.run(
        [*map(str, line), "--config", str(tmp_path / "config.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("pretrain: 2 epochs done") == 1
    for row, other in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert other["train_loss"] == pytest.approx(row["train_loss"], rel=2e-3)


def test_wrong_input_is_said(faces_file: Path, face_config: PipelineConfig, tmp_path: Path) -> None:
    pretrain_encoder([faces_file], [faces_file], tmp_path / "run", face_config)
    with pytest.raises(CheckpointError, match="another config"):
        pretrain_encoder([faces_file], [faces_file], tmp_path / "run", changed(face_config, batch_faces=8))
    faces = read_faces(faces_file, "train")
    blank = type(faces)(names=faces.names, votes=0 * faces.votes, single=faces.single, image=faces.image)
    with pytest.raises(DataError, match="No face of the validation sets has a majority label"):
        pretrain_encoder(faces, blank, tmp_path / "b", face_config)
    with pytest.raises(DataError, match="None of the 48 faces has a majority"):
        evaluate_faces("drawn_swin", blank)


def test_an_image_that_cannot_be_read_is_left_out_of_training_and_ends_a_scoring(
    faces_file: Path, face_config: PipelineConfig, tmp_path: Path
) -> None:
    faces = read_faces(faces_file, "train")

    def image(index: int) -> np.ndarray:
        if index == 7:
            raise DataError("face07.jpg: the JPEG is damaged or cut off")
        return faces.image(index)

    damaged = replace(faces, image=image)
    report = pretrain_encoder(damaged, faces, tmp_path / "a", changed(face_config, sampling="uniform"))
    assert "46 validation faces have names of training faces" in "\n".join(report.notes)
    assert [failure.video_id for failure in report.failures] == ["face07"]
    assert "damaged" in (tmp_path / "a" / "status.csv").read_text()
    assert len(history(tmp_path / "a")) == 3
    with pytest.raises(DataError, match=r"Validation faces that cannot be read:(?s:.*)face07\.jpg"):
        pretrain_encoder(faces, damaged, tmp_path / "b", face_config)
    assert not (tmp_path / "b").exists(), "said before anything is trained"
    with pytest.raises(DataError, match=r"face07\.jpg"):
        evaluate_faces("drawn_swin", damaged)

    def missing(index: int) -> np.ndarray:
        if index % 2:
            raise DataError(f"face{index:02d}.jpg: cannot be read")
        return faces.image(index)

    with pytest.raises(DataError) as caught:
        evaluate_faces("drawn_swin", replace(faces, image=missing))
    assert str(caught.value).splitlines() == [
        "Faces that cannot be read:",
        *(f"face{index:02d}.jpg: cannot be read" for index in range(3, 43, 2)),  # face01 has no majority
        "... and 3 more",
    ]


@pytest.fixture
def seven_file(faces_file: Path, tmp_path: Path) -> Path:
    """Those of the faces that none calls Other, as in RAF-DB, FER2013 and AffectNet-7: seven classes occur."""
    arrays = dict(np.load(faces_file))
    kept = np.flatnonzero(read_faces(faces_file, "train").majority() != EXPRESSIONS.index("Other"))
    np.savez(tmp_path / "seven.npz", **{key: array[kept] for key, array in arrays.items()})
    return tmp_path / "seven.npz"


def test_a_class_that_no_face_has_costs_nothing(
    seven_file: Path, face_config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    faces = read_faces(seven_file, "validation")
    monkeypatch.setattr(
        "vnaw_pipeline.prediction.faces.classify", lambda _, of, chosen: np.eye(8)[of.majority()[chosen]]
    )
    found = evaluate_faces("drawn_swin", faces)
    assert found.scores.macro_f1 == 1
    assert found.as_json()["num_classes"] == 7

    preprocessing = Preprocessing(input_px=32, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic")
    scored = LabelledFaces(faces, faces.targets("majority"), preprocessing)
    order = iter(torch.eye(8)[scored.targets.argmax(dim=1)].split(face_config.pretrain.batch_faces))
    figures = training._evaluate(scored, preprocessing, face_config.pretrain, None, lambda images: next(order))
    assert figures == {"macro_f1": 1.0, "accuracy": 1.0}


def test_the_command_says_how_many_classes_it_scores(seven_file: Path, tmp_path: Path) -> None:
    arguments = ["--encoder", "drawn_swin", "--faces", str(seven_file), "--json", str(tmp_path / "scores.json")]
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert done.exit_code == 0, done.output
    assert "faces with a majority; macro-F1 over the 7 classes that occur)" in done.output
    assert json.loads((tmp_path / "scores.json").read_text())["num_classes"] == 7


def test_scores_on_the_faces_that_an_encoder_has_learnt_from_say_so(
    faces_file: Path, seven_file: Path, face_config: PipelineConfig, tmp_path: Path
) -> None:
    pretrain_encoder([faces_file], [seven_file], tmp_path / "run", changed(face_config, epochs=1))
    best = str(tmp_path / "run" / "checkpoint" / "best.safetensors")
    note = "The encoder has learnt from these faces"
    for faces, learnt in ((faces_file, True), (seven_file, False)):
        found = tmp_path / "scores.json"
        done = CliRunner().invoke(app, ["evaluate", "--encoder", best, "--faces", str(faces), "--json", str(found)])
        assert done.exit_code == 0, done.output
        assert (note in done.output) == learnt
        assert json.loads(found.read_text())["learnt_from_these"] == learnt
    assert not evaluate_faces("drawn_swin", faces_file).learnt_from_these, "it records no faces"


def test_erased_rectangles_have_their_size_and_lie_inside() -> None:
    torch.manual_seed(0)
    images = torch.ones(400, 3, 40, 40)
    erased = erase_rectangles(images, 0.5) == 0
    assert torch.equal(erased[:, 0], erased[:, 1])
    shares = erased[:, 0].float().mean(dim=(1, 2))
    hit = shares > 0
    assert 0.4 < hit.float().mean() < 0.6
    assert shares[hit].min() > 0.01
    assert shares[hit].max() < 0.24, "20%, and up to a pixel more on each side"
    for mask in erased[hit, 0]:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert torch.equal(mask, rows[:, None] & columns[None, :]), "one rectangle"
    assert (erase_rectangles(images, 0.0) == 1).all()


def test_reading_ahead_keeps_order_and_raises_where_it_is_read() -> None:
    read: list[int] = []

    def double(number: int) -> int:
        read.append(number)
        if number == 3:
            raise DataError("three")
        return 2 * number

    batches = read_ahead(double, range(5))
    assert next(batches) == 0
    assert next(batches) == 2
    assert read[:3] == [0, 1, 2], "one ahead"
    assert next(batches) == 4
    with pytest.raises(DataError, match="three"):
        next(batches)
    assert list(read_ahead(double, [])) == []
