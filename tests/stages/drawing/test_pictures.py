"""The curve of losses: where its points stand."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure

from stages.drawing.pictures import loss_curve


def row(kind: str, step: int, loss: float) -> dict:
    return {"kind": kind, "step": step, "loss": loss}


def test_stages_follow_each_other_on_one_axis(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    first = [row("train", 3, 0.9), row("validation", 5, 0.8), row("train", 6, 0.7)]
    second = [row("train", 3, 0.6), row("validation", 7, 0.5)]
    loss_curve(io.BytesIO(), {"train-256": first, "nothing": [], "train-512": second})
    (axes,) = figures[0].axes
    # The second begins where the first ended, which is its last step of either kind.
    expected = [[(3, 0.9), (6, 0.7)], [(5, 0.8)], [(9, 0.6)], [(13, 0.5)]]
    assert len(axes.lines) == len(expected)
    for line, points in zip(axes.lines, expected, strict=True):
        assert np.allclose(line.get_xydata(), points)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train-256, held-out rows", "train-512, held-out rows"]
