"""The stage `bench`: runs the measurements that are asked for, each in a folder of its own that is removed after it."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vnaw_pipeline.bench.encoding import (
    measure_backend,
    measure_extraction,
    measure_extraction_memory,
    measure_scores,
)
from vnaw_pipeline.bench.figure import Figure
from vnaw_pipeline.bench.scale import measure_scale, measure_start
from vnaw_pipeline.bench.size import Size
from vnaw_pipeline.bench.training import (
    measure_bank,
    measure_prediction,
    measure_prediction_memory,
    measure_training,
    measure_training_memory,
    measure_windows,
)
from vnaw_pipeline.errors import ConfigError, DataError

MEASUREMENTS: dict[str, Callable[[Path, Size], list[Figure]]] = {
    "extraction": measure_extraction,
    "backend": measure_backend,
    "scores": measure_scores,
    "bank": measure_bank,
    "windows": measure_windows,
    "training": measure_training,
    "prediction": measure_prediction,
    "extraction-memory": measure_extraction_memory,
    "training-memory": measure_training_memory,
    "prediction-memory": measure_prediction_memory,
    "scale": measure_scale,
    "start": measure_start,
}


def run_bench(work_dir: Path, size: Size, names: Sequence[str]) -> Iterator[Figure]:
    """Measure, and yield each figure as it is found; no names are all of them.

    Raises:
        ConfigError: a name that is none. DataError: the disk of `work_dir` has too little room.
    """
    if unknown := [name for name in names if name not in MEASUREMENTS]:
        raise ConfigError(f"There is no measurement {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}.")
    work_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work_dir).free
    if free < size.disk_bytes:
        raise DataError(
            f"{work_dir} has {free / 1e9:.1f} GB free; measurements write {size.disk_bytes / 1e9:.1f} GB at a time. "
            "Give another --work-dir, or measure with --quick."
        )
    for name in names or MEASUREMENTS:
        with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=work_dir) as folder:
            yield from MEASUREMENTS[name](Path(folder), size)
