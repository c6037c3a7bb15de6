"""What a person sees while a recipe runs: moving bars on a terminal, plain lines anywhere else, a table at the end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipelines.flows.run import Outcome, Run
from stages.runner.graph import Planned

STYLES = {"reused": "cyan", "made": "green", "failed": "bold red", "stopped": "yellow", "not run": "dim"}
PLAN_STYLES = {"hit": "cyan", "stale": "yellow", "miss": "green"}
# Without a terminal a line a report would fill a log file: one per phase, and then one in this many seconds.
PLAIN_EVERY = 10.0


class ReportTable(Table):
    """A table with lines on a terminal, and plain columns in a file or a pipe, which programs read."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not console.is_terminal:
            self.box, self.pad_edge = None, False
        return super().__rich_console__(console, options)


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
    """Node, result, rows in and out, drops by reason, seconds, fingerprint, where: a row a node of the run."""
    table = ReportTable(title=run.recipe.name, title_justify="left")
    table.add_column("node", no_wrap=True)
    table.add_column("result", no_wrap=True)
    for head in ("rows in", "rows out"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("dropped")
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("fingerprint", overflow="fold", max_width=24)
    table.add_column("where", overflow="fold")
    for node in run.nodes:
        outcome = run.outcomes.get(node, Outcome(node, "not run"))
        stats = outcome.dataset.manifest.stats if outcome.dataset else None
        table.add_row(
            node,
            f"[{STYLES[outcome.result]}]{outcome.result}[/]",
            f"{stats.rows_in:,}" if stats else "",
            f"{stats.rows_out:,}" if stats else "",
            ", ".join(f"{rows} {reason}" for reason, rows in stats.dropped.items()) if stats else "",
            f"{outcome.seconds:.1f}",
            run.planned[node].fingerprint,
            run.store.url(outcome.dataset.folder).removesuffix(run.planned[node].fingerprint) if outcome.dataset else "",
        )
    return table


def plan_table(planned: Mapping[str, Planned], nodes: Sequence[str]) -> Table:
    """For every node hit, stale or miss, and which field or input made it so."""
    table = ReportTable()
    for head in ("node", "state", "fingerprint"):
        table.add_column(head, no_wrap=True)
    table.add_column("because", overflow="fold")
    for node in nodes:
        plan = planned[node]
        table.add_row(node, f"[{PLAN_STYLES[plan.state]}]{plan.state}[/]", plan.fingerprint, escape("; ".join(plan.reasons)))
    return table
