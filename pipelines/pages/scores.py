"""The part of a filter's page from which a person chooses thresholds: histograms of the scores, and what each threshold keeps."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.pages.drawings import drawn_once

INK, PALE, BAR, LINE = "#22272e", "#8b949e", "#6aa5d8", "#c4572a"
COLUMNS = 2


def scores_section(scores: dict[str, dict[str, Any]], config: dict[str, Any], drawings: Path) -> list[str]:
    """Markdown: one picture of all histograms, then a table of thresholds.

    A score that no row has is left out.

    Args:
        scores: a filter's ``summary["scores"]``, see `stages.filter.histogram.histogram_of`.
        config: the filter's configuration, whose ``min_SCORE`` and ``max_SCORE`` are marked.
        drawings: the folder that keeps the picture, see `pipelines.pages.drawings`.
    """
    scores = {score: told for score, told in scores.items() if sum(told["counts"])}
    if not scores:
        return []
    picture = base64.b64encode(drawn_once(drawings, draw, scores, config)).decode()
    return [
        "## Scores",
        f"![histograms of {', '.join(scores)}](data:image/png;base64,{picture})",
        threshold_table(scores, config),
    ]


def bound_of(score: str, config: dict[str, Any]) -> tuple[str, float | None]:
    """The word of the score's condition, and its bound where one is set: ``("max", 0.5)`` for punsafe."""
    for word in ("min", "max"):
        if f"{word}_{score}" in config:
            return word, config[f"{word}_{score}"]
    return "min", None


def threshold_table(scores: dict[str, dict[str, Any]], config: dict[str, Any]) -> str:
    """A line for every score and threshold, of all rows that have the score and of nothing else that is asked of them."""
    lines = ["| threshold | rows kept | of those with the score |", "|---|---|---|"]
    for score, told in scores.items():
        word, chosen = bound_of(score, config)
        known = sum(told["counts"])
        without = f"; {told['unknown']:,} rows without it" if told["unknown"] else ""
        asked = f"asked for: {chosen:g}" if chosen is not None else "not asked for"
        lines.append(f"| **{score}** ({asked}) | {known:,} rows{without} | |")
        sign = "<" if word == "max" else ">="
        lines += [f"| {score} {sign} {at:g} | {rows:,} | {rows / known:.1%} |" for at, rows in told["rows_at"]]
    return "\n".join(lines)


def draw(scores: dict[str, dict[str, Any]], config: dict[str, Any]) -> bytes:
    """PNG: a histogram a score, the share of rows that a threshold keeps as a line over it, the chosen threshold dashed."""
    from matplotlib.figure import Figure

    rows = -(-len(scores) // COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, 2.6 * rows), dpi=80, facecolor="white")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, (score, told) in zip(grid, scores.items(), strict=False):
        counts, edges = np.array(told["counts"]), np.linspace(told["low"], told["high"], len(told["counts"]) + 1)
        word, chosen = bound_of(score, config)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BAR)
        below = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
        kept = axes.twinx()
        kept.plot(edges, below if word == "max" else 1 - below, color=INK, linewidth=1.2)
        kept.set_ylim(0, 1.05)
        kept.set_ylabel("share kept", color=INK, fontsize=8)
        if chosen is not None:
            axes.axvline(chosen, color=LINE, linestyle="--", linewidth=1.4)
        filled = np.flatnonzero(counts)
        places = [edges[filled[0]], edges[filled[-1] + 1], *([chosen] if chosen is not None else [])]
        margin = 0.04 * (max(places) - min(places))
        axes.set_xlim(min(places) - margin, max(places) + margin)
        asked = "" if chosen is None else f", {'at most' if word == 'max' else 'at least'} {chosen:g}"
        axes.set_title(f"{score}{asked}", loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.set_ylabel("rows", color=INK, fontsize=8)
        for side in (axes, kept):
            side.tick_params(labelsize=8, colors=INK)
            side.spines["top"].set_visible(False)
    for axes in grid[len(scores) :]:
        axes.set_axis_off()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
