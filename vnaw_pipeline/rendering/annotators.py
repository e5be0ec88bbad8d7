"""What annotators make of the truth: late boundaries, confusable classes, whole spans missed, spans left out."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vnaw_pipeline.tasks import EXPRESSIONS, IGNORE_LABEL

Classes = NDArray[np.int64]

# What an expression is taken for when it is not recognised, and how often.
CONFUSIONS: Mapping[str, Mapping[str, float]] = {
    "Neutral": {"Other": 0.5, "Sadness": 0.3, "Happiness": 0.2},
    "Anger": {"Disgust": 0.4, "Other": 0.4, "Neutral": 0.2},
    "Disgust": {"Anger": 0.4, "Other": 0.4, "Sadness": 0.2},
    "Fear": {"Surprise": 0.5, "Other": 0.3, "Sadness": 0.2},
    "Happiness": {"Neutral": 0.45, "Other": 0.45, "Surprise": 0.1},
    "Sadness": {"Neutral": 0.5, "Other": 0.4, "Disgust": 0.1},
    "Surprise": {"Fear": 0.3, "Other": 0.4, "Neutral": 0.3},
    "Other": {"Neutral": 0.5, "Happiness": 0.2, "Sadness": 0.2, "Anger": 0.1},
}

_LAG_FRAMES = (7.0, 7.0)  # mean and deviation of how late a change is marked; negative: early
_LARGEST_SHIFT = 0.25  # of the shorter of the two runs that meet
_MISTAKEN_PART = (0.2, 0.6)  # of a run that is not recognised at first, or no longer
_WHOLE_RUN_SHARE = 0.3  # of the runs that are mistaken, from beginning to end
_SPAN_FRAMES = (15, 80)  # of a span left without annotation


def annotate_expressions(
    truths: Sequence[Classes], wrong_share: float, unlabelled_share: float, generator: np.random.Generator
) -> list[Classes]:
    """Label a split's videos as people would.

    Boundaries are marked late or early; then spans, some of them a whole run of an expression, are taken for a class
    that looks alike, until `wrong_share` of the frames of every true class has another label. As long as that is under
    a half, the right label stays the most frequent one of every class, so that the truth can be learnt. Last, spans
    are left out.

    Args:
        truths: for each video its true classes (T,).
        unlabelled_share: of all frames, that get IGNORE_LABEL.

    Returns:
        For each video the given labels (T,).
    """
    given = [_shift_boundaries(truth, generator) for truth in truths]
    for expression in range(len(EXPRESSIONS)):
        _mistake_spans(expression, truths, given, wrong_share, generator)
    for labels in given:
        labels[unannotated(len(labels), unlabelled_share, generator)] = IGNORE_LABEL
    return given


def unannotated(num_frames: int, share: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Which frames of a video (T,) are left out: spans that make up the given share."""
    left_out = np.zeros(num_frames, dtype=bool)
    wanted = round(share * num_frames)
    while (missing := wanted - int(left_out.sum())) > 0:
        length = min(int(generator.integers(*_SPAN_FRAMES)), missing)
        start = int(generator.integers(0, num_frames - length + 1))
        left_out[start : start + length] = True
    return left_out


def _runs(labels: Classes) -> Iterator[tuple[int, int]]:
    """Start and stop of every stretch of equal labels."""
    changes = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    yield from pairwise(changes)


def _shift_boundaries(truth: Classes, generator: np.random.Generator) -> Classes:
    given = truth.copy()
    runs = list(_runs(truth))
    for (start, boundary), (_, stop) in pairwise(runs):
        largest = int(_LARGEST_SHIFT * min(boundary - start, stop - boundary))
        shift = int(np.clip(round(generator.normal(*_LAG_FRAMES)), -largest, largest))
        if shift > 0:
            given[boundary : boundary + shift] = truth[boundary - 1]
        elif shift < 0:
            given[boundary + shift : boundary] = truth[boundary]
    return given


def _mistake_spans(
    expression: int,
    truths: Sequence[Classes],
    given: Sequence[Classes],
    wrong_share: float,
    generator: np.random.Generator,
) -> None:
    """Relabel spans of one true class in place until its wrong share is reached."""
    runs = [
        (video, start, stop)
        for video, truth in enumerate(truths)
        for start, stop in _runs(truth)
        if truth[start] == expression
    ]
    total = sum(stop - start for _, start, stop in runs)
    wrong = sum(int((given[video][start:stop] != expression).sum()) for video, start, stop in runs)
    rivals = CONFUSIONS[EXPRESSIONS[expression]]
    for index in generator.permutation(len(runs)):
        video, start, stop = runs[index]
        right = np.flatnonzero(given[video][start:stop] == expression) + start
        allowed = round(wrong_share * total) - wrong
        if allowed <= 0:
            return
        rival = EXPRESSIONS.index(str(generator.choice(list(rivals), p=list(rivals.values()))))
        # All of the run or a part from its beginning or its end, as long as that many may still be wrong.
        part = 1.0 if generator.random() < _WHOLE_RUN_SHARE else generator.uniform(*_MISTAKEN_PART)
        length = min(round(part * len(right)), allowed)
        span = right[:length] if generator.random() < 0.5 else right[len(right) - length :]
        given[video][span] = rival
        wrong += len(span)
