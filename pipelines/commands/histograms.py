"""Histograms of a filter's scores on a terminal, from which a person chooses thresholds."""

from __future__ import annotations

from typing import Any

from rich.bar import Bar
from rich.table import Table

from pipelines.commands.terminal import ReportTable
from pipelines.pages.scores import bound_of

# How many bars a histogram has at most, and how many cells the longest is wide.
BARS = 12
BAR_WIDTH = 32
# How many of the counted bins a bar may stand for: its bounds stay round numbers.
STEPS = (1, 2, 4, 10, 20, 40, 100)


def histogram_table(score: str, told: dict[str, Any], config: dict[str, Any]) -> Table:
    """A bar for every range of a score that rows have, with the rows in it and the rows that a threshold at its edge would keep.

    Args:
        told: see `stages.filter.histogram.histogram_of`.
        config: the filter's configuration, whose threshold is told in the title.
    """
    counts, word, chosen = told["counts"], *bound_of(score, config)
    known = sum(counts)
    table = ReportTable(heading=_title(score, told, word, chosen))
    table.add_column(score, justify="right", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("")
    table.add_column(f"{word} keeps", justify="right", no_wrap=True)
    filled = [number for number, rows in enumerate(counts) if rows]
    if not filled:
        return table
    step = next(step for step in STEPS if filled[-1] // step - filled[0] // step < BARS)
    bars = {begin: sum(counts[begin : begin + step]) for begin in range(filled[0] // step * step, filled[-1] + 1, step)}
    width, below = (told["high"] - told["low"]) / len(counts), 0
    for begin, rows in bars.items():
        low, high = (told["low"] + width * edge for edge in (begin, begin + step))
        kept = below + rows if word == "max" else known - below
        bar = Bar(max(bars.values()), 0, rows, width=BAR_WIDTH, color="cyan")
        table.add_row(f"{low:.3g} .. {high:.3g}", f"{rows:,}", bar, f"{kept / known:.0%}")
        below += rows
    return table


def _title(score: str, told: dict[str, Any], word: str, chosen: float | None) -> str:
    asked = "no threshold" if chosen is None else f"{word}_{score} {chosen:g}"
    without = f"; {told['unknown']:,} rows without it" if told["unknown"] else ""
    return f"{score}: {sum(told['counts']):,} rows, {asked}{without}"
