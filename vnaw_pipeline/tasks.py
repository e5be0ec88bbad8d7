"""Label spaces: names, file headers, codes for 'not annotated'. The only module that knows them.

Formats: Aff-Wild2 as the ABAW challenges ship it. The spaces coarse5 and negative4 are from CFC-SP
(Xue et al. 2022).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

IGNORE_LABEL = -1
"""Class label of a frame that takes no part in a loss or a metric."""

EXPRESSIONS = ("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other")
AFFECT_DIMENSIONS = ("valence", "arousal")
ACTION_UNITS = ("AU1", "AU2", "AU4", "AU6", "AU7", "AU10", "AU12", "AU15", "AU23", "AU24", "AU25", "AU26")

TaskName = Literal["expr8", "coarse5", "negative4", "va", "au"]
ExpressionTask = Literal["expr8", "coarse5", "negative4"]
TaskKind = Literal["classes", "affect", "units"]

_METRICS: dict[TaskKind, tuple[str, str]] = {
    "classes": ("macro_f1", "macro-F1"),
    "affect": ("mean_ccc", "mean CCC"),
    "units": ("mean_au_f1", "mean AU-F1"),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One label space.

    `annotation_dirs` are the folder names the challenges have used, `header` the columns of their text files,
    `outputs` the names of what a model predicts. `not_annotated` is the code in the files; `from_expr8` maps the
    eight expressions into a derived space (IGNORE_LABEL: the frame is not used there).
    """

    name: TaskName
    kind: TaskKind
    annotation_dirs: tuple[str, ...]
    header: tuple[str, ...]
    not_annotated: int
    outputs: tuple[str, ...]
    from_expr8: tuple[int, ...] | None = None

    @property
    def template_header(self) -> str:
        """First line of the challenge's submission template."""
        return ",".join(("image_location", *self.header))

    @property
    def num_fields(self) -> int:
        """Values of one frame in the challenge's files: one class (their header names eight), else one a column."""
        return 1 if self.kind == "classes" else len(self.header)

    @property
    def prediction_columns(self) -> list[str]:
        """Columns of the prediction table, in the order of `outputs`: `valence` and `arousal`, else `p_neutral` ..."""
        return list(self.outputs) if self.kind == "affect" else [f"p_{name.lower()}" for name in self.outputs]

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of one frame's label in arrays."""
        return () if self.kind == "classes" else (len(self.outputs),)

    @property
    def unlabelled(self) -> float:
        """What stands for 'not annotated' in arrays: NaN for valence and arousal, else IGNORE_LABEL."""
        return math.nan if self.kind == "affect" else IGNORE_LABEL

    @property
    def metric(self) -> str:
        """Key of the task's main score; higher is better."""
        return _METRICS[self.kind][0]

    @property
    def metric_title(self) -> str:
        """The main score's name for readers."""
        return _METRICS[self.kind][1]


_EXPR_DIRS = ("EXPR_Recognition_Challenge", "EXPR_Classification_Challenge")

TASKS: dict[TaskName, Task] = {
    "expr8": Task(
        name="expr8",
        kind="classes",
        annotation_dirs=_EXPR_DIRS,
        header=EXPRESSIONS,
        not_annotated=-1,
        outputs=EXPRESSIONS,
    ),
    "coarse5": Task(
        name="coarse5",
        kind="classes",
        annotation_dirs=_EXPR_DIRS,
        header=EXPRESSIONS,
        not_annotated=-1,
        outputs=("Neutral", "Happiness", "Surprise", "Other", "Negative"),
        from_expr8=(0, 4, 4, 4, 1, 4, 2, 3),
    ),
    "negative4": Task(
        name="negative4",
        kind="classes",
        annotation_dirs=_EXPR_DIRS,
        header=EXPRESSIONS,
        not_annotated=-1,
        outputs=("Anger", "Disgust", "Fear", "Sadness"),
        from_expr8=(-1, 0, 1, 2, -1, 3, -1, -1),
    ),
    "va": Task(
        name="va",
        kind="affect",
        annotation_dirs=("VA_Estimation_Challenge",),
        header=AFFECT_DIMENSIONS,
        not_annotated=-5,
        outputs=AFFECT_DIMENSIONS,
    ),
    "au": Task(
        name="au",
        kind="units",
        annotation_dirs=("AU_Detection_Challenge",),
        header=ACTION_UNITS,
        not_annotated=-1,
        outputs=ACTION_UNITS,
    ),
}


def output_columns(tasks: Sequence[Task]) -> dict[TaskName, slice]:
    """Where each task's outputs stand among those of all, which lie side by side in the order of the tasks."""
    columns: dict[TaskName, slice] = {}
    start = 0
    for task in tasks:
        columns[task.name] = slice(start, start + len(task.outputs))
        start += len(task.outputs)
    return columns


Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SPLIT_DIRS: dict[str, str] = {"train": "Train_Set", "validation": "Validation_Set"}
"""Manifest split -> folder of the challenge's annotation tree. The test split has no annotations."""
