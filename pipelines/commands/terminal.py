"""What a person sees while a recipe runs: moving bars on a terminal, plain lines anywhere else, a table at the end."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from infra.dataset import Stats
from pipelines.commands.brief import short
from pipelines.flows.run import Outcome, Run
from stages.catalog import ROW_STAGES
from stages.runner.graph import Planned
from stages.runner.recipe import Recipe

STYLES = {"reused": "cyan", "made": "green", "failed": "bold red", "stopped": "yellow", "not run": "dim"}
PLAN_STYLES = {"hit": "cyan", "stale": "yellow", "miss": "green"}
# Without a terminal a line a report would fill a log file: one per phase, and then one in this many seconds.
PLAIN_EVERY = 10.0
# Words, and the parts of a word that is a node's name, a field or a path: those end with what joins them.
_WORD = re.compile(r"\s*\S+|\s+")
_PART = re.compile(r"\s*\S*?\w[-./,;:=_]+(?=[^\W\d])|\s*\S+$|\s+")
_LETTER = re.compile(r"\s*\S")


class Words:
    """A cell of a table whose lines end between words; a word that no line can hold is cut after a hyphen, a dot or the like."""

    def __init__(self, markup: str):
        self.text = Text.from_markup(markup)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        lines = self.text.plain.splitlines()
        parts = (part for line in lines for word in _WORD.findall(line) for part in _PART.findall(word))
        least, most = (max((cell_len(each.strip()) for each in some), default=0) for some in (parts, lines))
        return Measurement(least, most).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.text.split("\n", allow_blank=True):
            for part in line.divide(_line_starts(line.plain, options.max_width)):
                part.rstrip()
                yield part


def _line_starts(line: str, width: int) -> list[int]:
    """Where the second and every further line begins, so that none is wider than `width` cells."""
    starts, begin = [], 0

    def place(piece: re.Match[str], offset: int, cuts: Sequence[re.Pattern[str]]) -> None:
        """Put a piece on this line, or on the next, or its own pieces one by one if it is wider than any line."""
        nonlocal begin
        end = offset + piece.end()
        first = end - len(piece[0].lstrip())
        if cell_len(line[begin:end].rstrip()) <= width:
            return
        if cell_len(line[first:end]) > width and cuts:
            for smaller in re.finditer(cuts[0], piece[0]):
                place(smaller, offset + piece.start(), cuts[1:])
        elif first > begin:
            begin = first
            starts.append(begin)

    for word in _WORD.finditer(line):
        place(word, 0, (_PART, _LETTER))
    return starts


class ReportTable(Table):
    """A table that fits the terminal, and in a file or a pipe plain columns, which programs read."""

    def __init__(self, *headers: str, heading: str | None = None, **more: Any):
        super().__init__(*headers, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, **more)
        # Rich's own title is no wider than the table.
        self.heading = heading

    def add_row(self, *cells: Any, **more: Any) -> None:
        super().add_row(*(Words(cell) if isinstance(cell, str) else cell for cell in cells), **more)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not console.is_terminal:
            self.box = None
        # Two spaces between columns, with a box and without.
        self.collapse_padding = self.box is not None
        if self.heading is not None:
            yield Text(self.heading, style="bold")
        yield from super().__rich_console__(console, options)


class TerminalView:
    """Watches a run. The log lines themselves are in the Prefect UI; here only warnings and errors are shown."""

    def __init__(self, console: Console):
        self.console = console
        self.bars = Progress(
            SpinnerColumn(), TextColumn("{task.fields[node]}"), BarColumn(bar_width=24), TextColumn("{task.description}"),
            TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}
        self.last: dict[str, tuple[str, float]] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> TerminalView:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def started(self, node: str) -> None:
        self.tasks[node] = self.bars.add_task("", total=None, node=node)

    def progress(self, node: str, fields: dict[str, Any]) -> None:
        words = describe(fields)
        if self.console.is_terminal:
            self.bars.update(self.tasks[node], completed=fields["done"], total=max(fields["total"], 1), description=escape(words))
            return
        with self.lock:
            phase, moment = self.last.get(node, ("", 0.0))
            if phase != fields["phase"] or time.monotonic() - moment >= PLAIN_EVERY or fields["done"] == fields["total"]:
                self.last[node] = (fields["phase"], time.monotonic())
                self.line(node, words)

    def said(self, node: str, level: int, text: str) -> None:
        if level >= logging.WARNING:
            style = "red" if level >= logging.ERROR else "yellow"
            self.line(node, f"[{style}]{escape(text)}[/]", markup=True)

    def finished(self, outcome: Outcome) -> None:
        if outcome.node in self.tasks:
            self.bars.remove_task(self.tasks.pop(outcome.node))
        style = STYLES[outcome.result]
        rows = f" {outcome.dataset.manifest.stats.rows_out:,} rows" if outcome.dataset else ""
        more = f": {escape(outcome.message)}" if outcome.message else ""
        seconds = f" ({outcome.seconds:.1f} s)" if outcome.seconds else ""
        self.line(outcome.node, f"[{style}]{outcome.result}[/]{rows}{seconds}{more}", markup=True)

    def line(self, node: str, text: str, markup: bool = False) -> None:
        self.console.print(f"[bold]{node}[/] {text if markup else escape(text)}", highlight=False, soft_wrap=True)


def describe(fields: Mapping[str, Any]) -> str:
    """``write 3/10 units, rows 1200, rows_per_s 340.5, left 0:12``"""
    known = ("node", "phase", "done", "total", "unit")
    more = "".join(f", {name} {_short(value)}" for name, value in fields.items() if name not in known)
    return f"{fields['phase']} {fields['done']}/{fields['total']} {fields['unit']}{more}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def closing_table(run: Run) -> Table:
    """Node, result, rows, seconds, fingerprint: a row a node of the run."""
    table = ReportTable(heading=run.recipe.name)
    table.add_column("node")
    table.add_column("result", no_wrap=True)
    for head in ("rows", "seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("dataset", no_wrap=True)
    for node in run.nodes:
        outcome = run.outcomes.get(node, Outcome(node, "not run"))
        table.add_row(
            node,
            f"[{STYLES[outcome.result]}]{outcome.result}[/]",
            f"{outcome.dataset.manifest.stats.rows_out:,}" if outcome.dataset else "",
            f"{outcome.seconds:.1f}",
            short(run.planned[node].fingerprint),
        )
    return table


def funnel_table(recipe: Recipe, stats: Mapping[str, Stats]) -> Table:
    """What became of the rows of every subset, stage by stage: how many are left of all that came in, and why the others went."""
    table = ReportTable(heading="rows")
    table.add_column("node")
    for head in ("in", "out", "of all"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("dropped")
    first: dict[str, int] = {}
    for node, counted in stats.items():
        if recipe.nodes[node].stage not in ROW_STAGES and not counted.dropped:
            continue
        before = recipe.nodes[node].inputs.get("rows")
        first[node] = first.get(before or "", counted.rows_in)
        largest = sorted(counted.dropped.items(), key=lambda item: (-item[1], item[0]))
        reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in largest)
        share = counted.rows_out / max(first[node], 1)
        table.add_row(node, f"{counted.rows_in:,}", f"{counted.rows_out:,}", f"{share:.1%}", escape(reasons))
    return table


def plan_table(planned: Mapping[str, Planned], nodes: Sequence[str]) -> Table:
    """For every node hit, stale or miss, and which field or input made it so."""
    table = ReportTable("node")
    for head in ("state", "dataset"):
        table.add_column(head, no_wrap=True)
    table.add_column("because")
    for node in nodes:
        plan = planned[node]
        state = f"[{PLAN_STYLES[plan.state]}]{plan.state}[/]"
        table.add_row(node, state, short(plan.fingerprint), escape("; ".join(plan.reasons)))
    return table
