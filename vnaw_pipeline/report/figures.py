"""Figures: a confusion matrix, and a video's time line of labels and probabilities."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vnaw_pipeline.provenance import atomic_path
from vnaw_pipeline.tasks import IGNORE_LABEL

# One colour a class in the order of the expressions; distinguishable with common colour blindness (Okabe and Ito).
CLASS_COLOURS = ("#999999", "#d55e00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#e69f00", "#56b4e9")
_UNLABELLED_COLOUR = "#ffffff"
_TITLE_LETTERS = 60


def draw_confusion(path: Path, confusion: npt.NDArray[np.int64], names: Sequence[str], title: str) -> None:
    """Write a confusion matrix (K, K), labels in rows, as a PNG: shares of each row, and how many frames it has."""
    rows = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, rows, out=np.zeros(confusion.shape), where=rows > 0)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(shares.shape):
        dark = shares[row, column] > 0.5
        axes.text(
            column,
            row,
            f"{100 * shares[row, column]:.0f}",
            ha="center",
            va="center",
            color="white" if dark else "black",
        )
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), [f"{name} ({count})" for name, count in zip(names, rows[:, 0], strict=True)])
    axes.set_xlabel("predicted, % of the row")
    axes.set_ylabel("label (frames)")
    _set_title(axes, title)
    _save(figure, path)


def draw_timeline(
    path: Path,
    bands: Mapping[str, npt.NDArray[np.int64]],
    probabilities: npt.NDArray[np.float32],
    names: Sequence[str],
    title: str,
    seconds: tuple[float, float] | None = None,
) -> None:
    """Write one video's time line as a PNG: a band of class colours for each series of labels, probabilities below.

    `bands` maps a name to class indices (T,), IGNORE_LABEL left white; `probabilities` is (T, K), zero where there are
    none. The T columns are frames, or lie evenly over a span of `seconds`, which the axis then shows as mm:ss.
    """
    num_frames = len(probabilities)
    left, right = seconds or (-0.5, num_frames - 0.5)
    half_column = (right - left) / num_frames / 2
    figure = Figure(figsize=(9, 1.6 + 0.35 * len(bands) + 2.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[0.4 * len(bands), 2])
    colours = CLASS_COLOURS[: len(names)]
    coded = np.stack([np.where(band == IGNORE_LABEL, len(names), band) for band in bands.values()])
    extent = (left, right, len(bands) - 0.5, -0.5)
    upper.imshow(
        coded,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap([*colours, _UNLABELLED_COLOUR]),
        vmin=-0.5,
        vmax=len(names) + 0.5,
        extent=extent,
    )
    upper.set_yticks(range(len(bands)), list(bands))
    for edge in range(1, len(bands)):
        upper.axhline(edge - 0.5, color="white", linewidth=3)
    _set_title(upper, title)
    centres = np.linspace(left + half_column, right - half_column, num_frames)
    lower.stackplot(centres, probabilities.T, colors=colours, labels=list(names))
    lower.set_xlim(left, right)
    lower.set_ylim(0, 1)
    lower.set_xlabel("frame_index" if seconds is None else "time")
    if seconds is not None:
        lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        lower.xaxis.set_major_formatter(lambda second, _: clock_time(second))
    lower.set_ylabel("probability")
    figure.legend(*lower.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def clock_time(seconds: float) -> str:
    """m:ss, with hours where there are some: 75.2 -> '1:15'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _set_title(axes: Axes, title: str) -> None:
    """Long file names are shortened in the middle, so that they fit."""
    if len(title) > _TITLE_LETTERS:
        title = f"{title[: _TITLE_LETTERS // 2]}...{title[-_TITLE_LETTERS // 2 :]}"
    axes.set_title(title, parse_math=False)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as partial, warnings.catch_warnings():
        # Letters of file names that the font does not have are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(partial, dpi=110)
