"""The commands as a user gives them: whole runs, frozen options, and wrong input that ends in one message."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from vnaw_pipeline.cli import app, main
from vnaw_pipeline.config import PipelineConfig, PredictConfig, dump_config
from vnaw_pipeline.prediction.predict import read_predictions
from vnaw_pipeline.prediction.tables import finish_table, open_predicted
from vnaw_pipeline.tasks import TASKS

from .conftest import DrawnData

FROZEN_OPTIONS = {
    "demo": {"--work-dir", "--config", "--set"},
    "manifest": {
        "--out",
        "--crops",
        "--annotations",
        "--task",
        "--test-list",
        "--template",
        "--videos",
        "--folds",
        "--seed",
    },
    "check": {"--manifest", "--crops", "--annotations", "--task", "--template", "--videos"},
    "crop": {"--out", "--config", "--set", "--overwrite"},
    "pretrain": {
        "--faces",
        "--validation",
        "--run-dir",
        "--config",
        "--set",
        "--overwrite",
        "--allow-pickle",
    },
    "finetune": {
        "--manifest",
        "--annotations",
        "--crops",
        "--run-dir",
        "--config",
        "--set",
        "--fold",
        "--overwrite",
        "--allow-pickle",
    },
    "extract": {"--manifest", "--crops", "--store", "--config", "--set", "--allow-pickle"},
    "import": {"--manifest", "--features", "--store"},
    "export": {"--store", "--out", "--layout", "--manifest"},
    "train": {"--manifest", "--annotations", "--store", "--run-dir", "--config", "--set", "--fold", "--overwrite"},
    "predict": {"--manifest", "--store", "--run-dir", "--split", "--set", "--tuned", "--predictions"},
    "tune": {"--manifest", "--annotations", "--run-dir", "--predictions"},
    "combine": {"--run-dir", "--how", "--out", "--split", "--tuned"},
    "evaluate": {
        "--manifest",
        "--annotations",
        "--run-dir",
        "--encoder",
        "--faces",
        "--split",
        "--json",
        "--predictions",
    },
    "crossval": {"--manifest", "--annotations", "--store", "--out", "--config", "--set"},
    "ablate": {"--manifest", "--annotations", "--store", "--out", "--seed", "--config", "--set"},
    "cascade": {"--manifest", "--annotations", "--store", "--out", "--config", "--set"},
    "submit": {"--run-dir", "--template", "--out", "--split", "--predictions"},
    "infer": {"--out", "--encoder", "--run-dir", "--camera", "--config", "--set", "--allow-pickle"},
    "bench": {"--work-dir", "--quick", "--videos", "--json"},
}
"""A new option belongs in the config unless it says where; then add it here."""


def vnaw(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vnaw_pipeline", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=180)


def test_options_are_frozen() -> None:
    import typer

    group = typer.main.get_command(app)
    found = {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert found == FROZEN_OPTIONS


def test_help_names_every_command_in_pipeline_order() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    places = [text.index(f" {name} ") for name in FROZEN_OPTIONS]
    assert places == sorted(places)


@pytest.fixture(scope="module")
def finished(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A work folder in which every command has run."""
    work = tmp_path_factory.mktemp("work")
    (work / "config.yaml").write_text(dump_config(tiny_config))
    tree = ("--annotations", drawn.annotations, "--crops", drawn.crops)
    steps = [
        ("manifest", *tree, "--out", work / "m.csv", "--template", drawn.template),
        ("check", "--manifest", work / "m.csv", *tree, "--template", drawn.template),
        (
            *("train", "--manifest", work / "m.csv", "--annotations", drawn.annotations, "--store", drawn_store),
            *("--run-dir", work / "run", "--config", work / "config.yaml", "--set", "train.tracker=tensorboard"),
        ),
        ("predict", "--manifest", work / "m.csv", "--store", drawn_store, "--run-dir", work / "run"),
        ("tune", "--manifest", work / "m.csv", "--annotations", drawn.annotations, "--run-dir", work / "run"),
        (
            *("predict", "--manifest", work / "m.csv", "--store", drawn_store, "--run-dir", work / "run"),
            *("--split", "test", "--tuned", "--set", "predict.batch_windows=3", "--set", "predict.precision=fp32"),
        ),
        ("predict", "--manifest", work / "m.csv", "--store", drawn_store, "--run-dir", work / "run", "--tuned"),
        ("combine", *2 * ("--run-dir", work / "run"), "--how", "mean", "--out", work / "both"),
        ("combine", *2 * ("--run-dir", work / "run"), "--how", "mean", "--out", work / "both", "--split", "test"),
        ("evaluate", "--manifest", work / "m.csv", "--annotations", drawn.annotations, "--run-dir", work / "both"),
        ("submit", "--run-dir", work / "both", "--template", drawn.template, "--out", work / "both.txt"),
        (
            *("evaluate", "--manifest", work / "m.csv", "--annotations", drawn.annotations),
            *("--run-dir", work / "run", "--json", work / "scores.json"),
        ),
        ("submit", "--run-dir", work / "run", "--template", drawn.template, "--out", work / "submission.txt"),
    ]
    for step in steps:
        done = vnaw(*step)
        assert done.returncode == 0, f"{step[0]}: {done.stdout}{done.stderr}"
    return work


def test_a_whole_run_leaves_what_it_says(finished: Path, drawn: DrawnData) -> None:
    assert (finished / "submission.txt").read_text().count("\n") == drawn.template.read_text().count("\n")
    assert (finished / "both.txt").read_text() == (finished / "submission.txt").read_text()
    run = open_predicted(finished / "run")
    raw = read_predictions(finished / "run" / "predictions" / "test_raw.parquet", TASKS["expr8"])
    final = read_predictions(finished / "run" / "predictions" / "test.parquet", TASKS["expr8"])
    assert finish_table(raw, run, run.tuned()).equals(final), "--tuned is what was tuned"
    assert not finish_table(raw, run, PredictConfig()).equals(final)
    assert list((finished / "run").rglob("events.out.tfevents*")), "tensorboard was asked for"
    assert {path.name for path in (finished / "run").iterdir()} >= {
        "config.yaml",
        "record.json",
        "metrics.jsonl",
        "checkpoint",
        "predictions",
    }


EXIT_TWO = ("gaps between windows", "misspelt key", "a cascade of what is none", "a run's own value", "tuned and set")
WRONG = {
    "gaps between windows": ("train", ["--set", "windows.train_stride=500"], "train_stride 500 leaves gaps"),
    "misspelt key": ("train", ["--set", "train.epocs=2"], "unknown key 'train.epocs'"),
    "no such store": ("train", ["--store", "{tmp}/nowhere"], "There is no feature store at"),
    "a file as store": ("predict", ["--store", "{tmp}/text.mp4"], "There is no feature store at"),
    "no such run": ("predict", ["--run-dir", "{tmp}/nowhere"], "is not a run folder"),
    "tuned before tuning": ("predict", ["--run-dir", "{tmp}/untuned", "--tuned"], "Make it with `vnaw tune`"),
    "a cascade of what is none": ("combine", ["--how", "hard"], "one run of coarse5 and one of negative4"),
    "a run's own value": ("predict", ["--set", "windows.predict_stride=1"], "takes values of the section predict only"),
    "tuned and set": ("predict", ["--tuned", "--set", "predict.smooth.kind=mean"], "--tuned has found these values"),
    "another template": ("submit", ["--template", "{va_template}"], "template of task va"),
    "a manifest that is none": ("train", ["--manifest", "{tmp}/text.mp4"], "the header is"),
    "another config in the folder": ("train", ["--set", "seed=5"], "another config"),
    "text as video": ("crop", ["{tmp}/text.mp4"], "text.mp4"),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_wrong_input_is_one_message(
    case: str, finished: Path, drawn: DrawnData, drawn_store: Path, tmp_path: Path
) -> None:
    command, changes, words = WRONG[case]
    (tmp_path / "text.mp4").write_text("not a video\n")
    shutil.copytree(finished / "run", tmp_path / "untuned", ignore=shutil.ignore_patterns("tuned.json"))
    va_template = drawn.root / "test_set_examples" / "CVPR_6th_ABAW_VA_test_set_example.txt"
    options = {
        "train": {
            "--manifest": finished / "m.csv",
            "--annotations": drawn.annotations,
            "--store": drawn_store,
            "--run-dir": finished / "run",
            "--config": finished / "config.yaml",
        },
        "tune": {
            "--manifest": finished / "m.csv",
            "--annotations": drawn.annotations,
            "--run-dir": finished / "run",
        },
        "combine": {"--run-dir": finished / "run", "--how": "mean", "--out": tmp_path / "both"},
        "predict": {"--manifest": finished / "m.csv", "--store": drawn_store, "--run-dir": finished / "run"},
        "submit": {"--run-dir": finished / "run", "--template": drawn.template, "--out": tmp_path / "s.txt"},
        "crop": {"--out": tmp_path / "crops"},
    }[command]
    filled = [change.format(tmp=tmp_path, va_template=va_template) for change in changes]
    arguments = [part for option, value in options.items() if option not in filled for part in (option, value)]
    done = vnaw(command, *arguments, *filled)
    said = done.stdout + done.stderr
    assert done.returncode == (2 if case in EXIT_TWO else 1), said
    assert "Traceback" not in said
    status = tmp_path / "crops" / "status.csv"
    assert words in said + (status.read_text() if status.exists() else "")


def test_wrong_usage_is_exit_code_two() -> None:
    unknown_task = ["manifest", "--task", "smile", "--crops", ".", "--out", "m.csv"]
    for arguments in (["train"], ["nonsense"], ["train", "--manifest", "/nowhere"], ["predict", "--split", "tset"],
                      unknown_task):  # fmt: skip
        done = vnaw(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_message_and_the_rerun_goes_on(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for a full disk: writes fail with an OSError half-way through."""
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config))
    line = [sys.executable, "-m", "vnaw_pipeline", "extract", "--manifest", drawn.manifest_path, "--crops", drawn.crops]
    line += ["--store", tmp_path / "s", "--config", tmp_path / "config.yaml"]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    full = subprocess.run(
        list(map(str, line)), capture_output=True, text=True, check=False, preexec_fn=limit, timeout=120
    )
    assert full.returncode == 1, full.stderr
    assert "Cannot read or write" in full.stderr
    assert "Traceback" not in full.stderr
    again = vnaw(*line[3:])
    assert again.returncode == 0, again.stderr
    assert "0 with failures" in again.stdout


def test_output_that_cannot_be_written_is_one_message(drawn: DrawnData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = vnaw(
        "manifest", "--crops", drawn.crops, "--annotations", drawn.annotations, "--out", tmp_path / "file/m.csv"
    )
    assert done.returncode == 1
    assert "Cannot read or write" in done.stderr
    assert str(tmp_path / "file") in done.stderr
    assert "Traceback" not in done.stderr


def test_check_lists_problems_and_fails(drawn: DrawnData, tmp_path: Path) -> None:
    table = pd.read_csv(drawn.manifest_path, keep_default_na=False)
    table.loc[0, "crops"] = "cropped_aligned/nowhere"
    table.loc[1, "annotation"] = "EXPR_Recognition_Challenge/Train_Set/nowhere.txt"
    table.to_csv(tmp_path / "m.csv", index=False)
    tree = ("--annotations", drawn.annotations, "--crops", drawn.crops)
    done = vnaw("check", "--manifest", tmp_path / "m.csv", *tree)
    assert done.returncode == 1
    assert done.stdout.count("error: ") >= 2
    assert "m.csv:2" in done.stdout


def test_ctrl_c_says_how_to_go_on(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    config = PipelineConfig.model_validate({**tiny_config.model_dump(), "train": {"epochs": 5_000, "batch_windows": 4}})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    # A program that is started in the background, as these tests may be, does not hear Ctrl-C.
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    line = [sys.executable, "-c", f"{hear}; from vnaw_pipeline.cli import main; main()", "train"]
    line += ["--manifest", drawn.manifest_path, "--annotations", drawn.annotations, "--store", drawn_store]
    line += ["--run-dir", tmp_path / "run", "--config", tmp_path / "config.yaml"]
    process = subprocess.Popen(list(map(str, line)), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in said
    assert "Traceback" not in said


def test_main_is_what_the_script_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vnaw", "--help"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert "extract" in capsys.readouterr().out


def test_a_full_gpu_is_one_message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("vnaw_pipeline.cli.app", full)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "memory is full: CUDA out of memory. Put less there at once" in capsys.readouterr().err
