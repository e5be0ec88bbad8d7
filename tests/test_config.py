"""Configuration: unknown keys refused, overrides applied, every shipped file loads and is complete."""

from pathlib import Path

import pytest
import yaml

from vnaw_pipeline.config import PipelineConfig, dump_config, load_config
from vnaw_pipeline.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_come_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_the_reference_config_holds_every_value() -> None:
    """A reader of the paper's run must not have to look up a default."""
    path = next(path for path in CONFIGS if path.stem == "affwild2_expr")
    assert _keys(yaml.safe_load(path.read_text())) == _keys(load_config(path).model_dump(mode="json"))


def _keys(values: object, prefix: str = "") -> set[str]:
    if not isinstance(values, dict) or prefix == "encoder.model_args.":
        return {prefix}
    return set().union(*(_keys(value, f"{prefix}{key}.") for key, value in values.items()), {prefix})


def test_tasks_stand_in_one_order_whatever_the_order_they_are_named_in() -> None:
    config = load_config(None, ["task=va", "train.sampling=uniform", "further_tasks={au: 0.5, expr8: 1}"])
    assert [task.name for task in config.tasks] == ["va", "expr8", "au"]


def test_overrides_change_one_value() -> None:
    config = load_config(None, ["train.epochs=5", "windows.skip.mode=mask", "encoder.mean=[0.5,0.5,0.5]"])
    assert (config.train.epochs, config.windows.skip.mode, config.encoder.mean) == (5, "mask", (0.5, 0.5, 0.5))
    assert config.train.model_copy(update={"epochs": 50}) == PipelineConfig().train


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["predict.further_smooth.au.foo=1"], r"unknown key 'predict.further_smooth.au.foo'. Known here: kind, half_"),
        (["pretrain.loss.weighting=class"], "sampling 'balanced' would both make up for the sizes of the classes"),
        (["finetune.loss.weighting=complement"], "the frames are drawn class by class already"),
        (["train.epocs=5"], r"unknown key 'train.epocs'. Known here: epochs, "),
        (["trian.epochs=5"], r"unknown key 'trian'. Known here: task, further_tasks, seed, "),
        (["windows.skip.share=[0.4,0.2]"], r"'windows.skip' = .*two ascending numbers"),
        (["windows.predict_stride=101"], "predict_stride 101 leaves gaps between windows of 100"),
        (["predict.bias=[0.5, 1.0]"], "predict.bias holds 2 numbers; the task has 8 outputs"),
        (["further_tasks.au=1", "predict.thresholds=[0.5]"], "predict.thresholds holds 1 numbers; the task has 12"),
        (["further_tasks.va=1", "predict.smooth.kind=mode"], "'mode' counts classes, which task va has not"),
        (["temporal.heads=3"], "width 512 is not a multiple of heads 3"),
        (["loss.lam_a=2"], "'loss.lam_a' = 2"),
        (
            ["predict.smooth_half_width=3"],
            r"unknown key 'predict.smooth_half_width'. Known here: batch_windows, precision, smooth",
        ),
        (["predict.smooth={kind: average}"], "'predict.smooth.kind' = 'average'"),
        (["predict.thresholds=[0.5, 1.0]"], "'predict.thresholds.1' = 1.0"),
        (["crop.detector=insightface"], "detector_path is needed"),
        (["task=va"], r"--set task=va: .*set train.sampling=uniform"),
        (["further_tasks.va=0"], "'further_tasks.va' = 0"),
        (["further_tasks.vs=1"], r"further_tasks.*'vs'"),
        (["further_tasks.expr8=1"], "holds the main task expr8"),
        (["further_tasks.coarse5=1"], "expr8 and coarse5 are made from the same labels"),
        (["train.epochs"], "not of the form section.key=value"),
        (["train.epochs=[1"], "not readable as a YAML value"),
        (["train.epochs=5", "train.epochs.x=5"], "'epochs' is a value, not a section"),
    ],
)
def test_wrong_values_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(None, overrides)


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {epocs: 3, learning_rate: -1}\nloss: {level: clip}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).count("\n") == 2
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: [", "not readable as YAML"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"- a\n", "must hold sections"),
    ],
)
def test_unreadable_files_are_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_an_empty_file_or_section_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for content in ("# nothing yet\n", "train:\npredict:\n  smooth:\n"):
        path.write_text(content)
        assert load_config(path) == PipelineConfig()
        overrides = ["train.epochs=5", "predict.smooth.kind=mean"]
        assert load_config(path, overrides) == load_config(None, overrides)
