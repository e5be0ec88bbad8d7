"""Train the drawn-face encoder that ships in `vnaw_pipeline/weights/`: render people, train, export in float16.

    python benchmarks/drawn_encoder.py WORK_DIR

Renders 120 training and 8 validation people with seed 1000 (the demo's have seed 0, so no person is in both), trains a
small Swin from nothing on their *true* expressions through `finetune_encoder`, and writes its best epoch to
`vnaw_pipeline/weights/drawn_swin.safetensors`. Goes on where it stopped.
"""

import sys
from pathlib import Path

import torch

from vnaw_pipeline.checkpoints import load_tensors, save_tensors
from vnaw_pipeline.config import load_config
from vnaw_pipeline.demo import demo_manifest
from vnaw_pipeline.rendering.dataset import render_dataset
from vnaw_pipeline.rendering.plan import DatasetPlan
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.training.frames import finetune_encoder

ROOT = Path(__file__).parent.parent
PLAN = DatasetPlan(train_videos=120, validation_videos=8, test_videos=1, frames=(200, 360), missing_share=0.0)


def main(work_dir: Path) -> None:
    sys.stdout.write(render_dataset(work_dir / "data", PLAN, seed=1000).summary() + "\n")
    run = RunFolder(work_dir / "run")
    report = finetune_encoder(
        demo_manifest(work_dir / "data"),
        work_dir / "data" / "truth",
        work_dir / "data" / "crops",
        run.path,
        load_config(ROOT / "configs" / "drawn_encoder.yaml"),
    )
    sys.stdout.write("\n".join([*report.notes, report.summary()]) + "\n")
    tensors, header = load_tensors(run.best)
    halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    # The people it has learnt from have the names of the demo's, and are others.
    kept = {key: value for key, value in header.items() if key not in ("config", "learnt_from")}
    save_tensors(ROOT / "vnaw_pipeline" / "weights" / "drawn_swin.safetensors", halves, kept)
    sys.stdout.write(f"exported {sum(v.numel() for v in halves.values()):,} numbers\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(Path(sys.argv[1]))
