"""The losses of two sides in one picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

INK, PALE = "#22272e", "#8b949e"
# A and B, wherever they are told apart: blue and orange, which all eyes tell apart.
COLOURS = ("#2f6fb0", "#c4572a")
WIDTHS = ("-", "--")


def curves(sides: Sequence[Mapping[str, Sequence[Mapping[str, Any]]]]) -> bytes | None:
    """PNG of the losses on held-out rows of A and of B, one stage of a training after the other; None where there are none.

    Args:
        sides: of A and of B the rows of `training.history` by node. Where no stage of a side has validations, it is the loss of
            the training.
    """
    from matplotlib.figure import Figure

    if not any(rows for side in sides for rows in side.values()):
        return None
    figure = Figure(figsize=(9, 3.8), dpi=110, facecolor="white")
    axes = figure.subplots()
    for letter, colour, line, side in zip("AB", COLOURS, WIDTHS, sides, strict=True):
        start = 0
        for node, rows in side.items():
            train = [(start + row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
            held = [(start + row["step"], row["loss"]) for row in rows if row["kind"] == "validation"]
            if train:
                axes.plot(*zip(*train, strict=True), color=colour, alpha=0.3, linewidth=1, linestyle=line)
            shown = held or train
            if shown:
                axes.plot(
                    *zip(*shown, strict=True), color=colour, linestyle=line, marker="o", markersize=3, label=f"{letter}  {node}"
                )
            start = max((step for step, _ in train + held), default=start)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss on held-out rows; pale: of training", color=INK)
    axes.grid(color=PALE, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_ylim()[0] > 0 and axes.get_ylim()[1] > 10 * max(axes.get_ylim()[0], 1e-9):
        axes.set_yscale("log")
    axes.legend(frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
