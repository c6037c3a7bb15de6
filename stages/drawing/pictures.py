"""Pictures that a person looks at: the sample sheet of all tasks, and the loss curve of a training run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

INK, PALE = "#22272e", "#8b949e"
NOISE_LOSS = "loss (mean squared error of the noise)"


def sample_sheet(
    file: Path | IO[bytes], rows: Sequence[tuple[str, Sequence[tuple[Image | None, str]]]], columns: int = 6
) -> None:
    """Draw titled rows of pictures with captions below; a cell without a picture shows its caption alone.

    Args:
        file: where the PNG goes.
        rows: (title, cells) with (picture or None, caption) cells; cells beyond `columns` are left out.
    """
    from matplotlib.figure import Figure

    # In heights of a picture: words alone need little, and below each row is room for captions and the next title.
    heights, below = [1.0 if any(picture for picture, _ in cells) else 0.3 for _, cells in rows], 0.42
    height = 2.75 * sum(each + below for each in heights) / (1 + below)
    figure = Figure(figsize=(2.1 * columns, height), dpi=100, facecolor="white")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes, (title, cells) in zip(grid, rows, strict=True):
        for place in axes:
            place.set_axis_off()
        axes[0].set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
        for place, (picture, caption) in zip(axes, cells, strict=False):
            lines = "\n".join(textwrap.wrap(caption, 30)[:4])
            if picture is None:
                place.text(0.5, 1.0, lines, ha="center", va="top", fontsize=8.5, color=INK, transform=place.transAxes)
                continue
            place.imshow(picture)
            place.text(0.5, -0.04, lines, ha="center", va="top", fontsize=7.5, color=INK, transform=place.transAxes)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.97, bottom=0.04, wspace=0.06, hspace=below * len(rows) / sum(heights))
    figure.savefig(file, format="png", metadata={"Software": None})


def loss_curve(file: Path | IO[bytes], histories: Mapping[str, Sequence[Mapping[str, Any]]], label: str = NOISE_LOSS) -> None:
    """Draw the training loss (pale) and the validation loss (dots) of training stages, one after the other.

    Args:
        file: where the PNG goes.
        histories: node -> rows of `training.history`, in the order in which they trained.
        label: of the losses.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=110, facecolor="white")
    axes = figure.subplots()
    start = 0
    for number, (node, rows) in enumerate(histories.items()):
        color = f"C{number}"
        train = [(start + row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
        held = [(start + row["step"], row["loss"]) for row in rows if row["kind"] == "validation"]
        if train:
            axes.plot(*zip(*train, strict=True), color=color, alpha=0.4, linewidth=1)
        if held:
            axes.plot(*zip(*held, strict=True), color=color, marker="o", markersize=3.5, label=f"{node}, held-out rows")
        start = max([step for step, _ in train + held], default=start)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(color=PALE, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, format="png", metadata={"Software": None})
