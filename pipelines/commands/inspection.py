"""What `status`, `lineage` and `inspect` show, as tables and trees."""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from infra.dataset import VERIFY, Dataset, FileEntry, Stats, find
from infra.store import Store, StoreError
from pipelines.commands.brief import moment, short
from pipelines.commands.histograms import histogram_table
from pipelines.commands.preflight import chain_problems
from pipelines.commands.terminal import PLAN_STYLES, ReportTable, funnel_table
from pipelines.flows.run import plan_run
from pipelines.pages.lineage import Branch
from stages.catalog import stage_class
from stages.runner.graph import Planned
from stages.runner.recipe import Recipe
from stages.runner.run import phase_states

# How many rows and files `inspect` shows, how many characters of a cell and of a value, and how many cells of terminal
# a row needs and a picture is wide.
ROWS = 5
FILES = 8
CELL = 60
VALUE = 240
ROW_WIDTH = 26
PICTURE_WIDTH = 64
# Seconds between two looks of `status --watch`, at least; and how many times as long as a look takes, so that a store of hundreds
# of thousands of units is asked a tenth of the time.
WATCH_EVERY = 2.0
WATCH_PAUSE = 9.0


def status_rows(recipe: Recipe, store: Store) -> list[dict[str, Any]]:
    """A dictionary a node: fingerprint, state and why, rows, when made, where."""
    rows, plans = [], plan_run(recipe, store)
    for node, planned in plans.items():
        dataset = find(store, planned.stage, planned.fingerprint)
        manifest = dataset.manifest if dataset else None
        rows.append(
            {
                "node": node,
                "stage": planned.stage,
                "fingerprint": planned.fingerprint,
                "state": planned.state,
                "reasons": [*planned.reasons, *(map(str, chain_problems(store, plans, [node])) if dataset is None else ())],
                "done": None if dataset else _done(planned, store),
                "rows_in": manifest.stats.rows_in if manifest else None,
                "rows_out": manifest.stats.rows_out if manifest else None,
                "dropped": manifest.stats.dropped if manifest else None,
                "created": manifest.created if manifest else None,
                "where": dataset.where if dataset else None,
            }
        )
    return rows


def _done(planned: Planned, store: Store) -> dict[str, Any] | None:
    """The phase that a node without dataset is in, and how much of it is done; None when there is nothing yet."""
    states = list(phase_states(planned, store, stage_class(planned.stage)))
    if not any(state.done for state in states):
        return None
    last = states[-1]
    return {"phase": last.name, last.counted: last.done, "of": last.total}


def status_table(rows: list[dict[str, Any]]) -> Table:
    table = ReportTable("node")
    table.add_column("state", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("dataset", no_wrap=True)
    table.add_column("made, or why not")
    for row in rows:
        made = row["created"] is not None
        table.add_row(
            row["node"],
            f"[{PLAN_STYLES[row['state']]}]{row['state']}[/]",
            f"{row['rows_out']:,}" if made else "",
            short(row["fingerprint"]) if made else "",
            moment(row["created"]) if made else escape("; ".join([*_so_far(row), *row["reasons"]])),
        )
    return table


def show_paths(rows: list[dict[str, Any]], console: Console) -> None:
    """Where each dataset lies, a line each, so that it can be copied whole."""
    for row in rows:
        if row["where"]:
            console.print(f"{row['node']}: {row['where']}", soft_wrap=True, highlight=False, markup=False)


def _so_far(row: dict[str, Any]) -> list[str]:
    done = row["done"]
    if not done:
        return []
    counted = "steps" if "steps" in done else "units"
    return [f"{done['phase']}: {done[counted]:,} of {done['of']:,} {counted} done"]


def watch_status(recipe: Recipe, store: Store, console: Console) -> None:
    """Show the status again and again until Ctrl-C; where there is no terminal, only when it has changed."""
    before: list[dict[str, Any]] = []
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            start = time.monotonic()
            rows = status_rows(recipe, store)
            took = time.monotonic() - start
            if rows != before:
                shown = status_view(recipe, rows)
                live.update(shown, refresh=True) if live is not None else console.print(shown)
            before = rows
            time.sleep(max(WATCH_EVERY, WATCH_PAUSE * took))


def status_view(recipe: Recipe, rows: list[dict[str, Any]]) -> Group:
    """The nodes, and below them what became of the rows."""
    made = {row["node"]: Stats(row["rows_in"], row["rows_out"], row["dropped"]) for row in rows if row["created"]}
    return Group(status_table(rows), "", funnel_table(recipe, made)) if made else Group(status_table(rows))


def lineage_tree(title: str, root: Branch) -> Tree:
    tree = Tree(f"{escape(root.label)} {title}" + ("" if root.branches else " nothing"))

    def grow(tree: Tree, branches: list[Branch]) -> None:
        for branch in branches:
            grow(tree.add(escape(branch.label)), branch.branches)

    grow(tree, root.branches)
    return tree


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """The whole manifest, and where the files lie, as JSON."""
    return {**dataset.manifest.model_dump(mode="json", by_alias=True), "where": dataset.where}


def inspect_dataset(dataset: Dataset, console: Console) -> None:
    """Print identity, counts, configuration, histograms, files, schema, a few rows, and the first picture."""
    manifest = dataset.manifest
    dropped = sorted(manifest.stats.dropped.items(), key=lambda item: (-item[1], item[0]))
    facts = {
        "dataset": f"{manifest.stage}/{manifest.fingerprint}",
        "node": manifest.node,
        "made": f"{moment(manifest.created)} in {manifest.seconds:.1f} s, generation {manifest.generation}",
        "code": ", ".join(f"{name} {value}" for name, value in manifest.code.items()),
        "rows": f"{manifest.stats.rows_in:,} in, {manifest.stats.rows_out:,} out",
        "dropped": ", ".join(f"{rows:,} {reason}" for reason, rows in dropped) or "nothing",
        "inputs": "\n".join(f"{name}: {i.stage}/{short(i.fingerprint)}" for name, i in manifest.inputs.items()) or "none",
    }
    summary = {name: value for name, value in manifest.summary.items() if name != "scores"}
    console.print(f"where: {dataset.where}", soft_wrap=True, highlight=False, markup=False)
    for title, values in ((None, facts), ("configuration", flat(manifest.config)), ("summary", flat(summary))):
        if values:
            console.print(_facts_table(title, values), "")
    for score, told in manifest.summary.get("scores", {}).items():
        console.print(histogram_table(score, told, manifest.config), "")
    console.print(_schema_table(manifest.columns), "", _files_table(manifest.files), "")
    for entry in dataset.files:
        if entry.name.endswith(".parquet"):
            console.print(_rows_table(dataset, entry, console.width))
            break
    if (picture := first_picture(dataset)) is not None:
        _show_picture(*picture, console)


def flat(values: Mapping[str, Any], place: str = "") -> dict[str, str]:
    """Nested JSON as one line a value, under the names that `--set` takes; a long one is cut.

    Example:
        >>> flat({"data": {"subsets": ["a"], "where": None}})
        {'data.subsets': '["a"]', 'data.where': 'null'}
    """
    lines: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            lines |= flat(value, f"{place}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines[f"{place}{name}"] = _cut(text, VALUE)
    return lines


def _facts_table(title: str | None, values: Mapping[str, str]) -> Table:
    table = ReportTable(heading=title, show_header=False)
    table.box = None
    for name, value in values.items():
        table.add_row(f"[bold]{escape(name)}[/]", escape(value))
    return table


def _schema_table(columns: dict[str, str]) -> Table:
    table = ReportTable("column", "type", heading="schema")
    for name, kind in columns.items():
        table.add_row(escape(name), escape(kind))
    return table


def _files_table(files: Sequence[FileEntry]) -> Table:
    table = ReportTable("file", heading=f"{len(files):,} files")
    for head in ("rows", "bytes"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("sha256", no_wrap=True)
    for entry in files[:FILES]:
        table.add_row(escape(entry.name), f"{entry.rows:,}", f"{entry.bytes:,}", short(entry.sha256))
    if len(files) > FILES:
        table.add_row(f"and {len(files) - FILES:,} more")
    return table


def _rows_table(dataset: Dataset, entry: FileEntry, width: int) -> Table:
    """The first rows of a Parquet file, a column a line, since LAION's rows are wider than terminals; as many as are readable."""
    with _opened(dataset, entry) as file:
        batch = next(pq.ParquetFile(file, page_checksum_verification=True).iter_batches(batch_size=ROWS), None)
    rows = batch.to_pylist()[: max(1, width // ROW_WIDTH - 1)] if batch is not None else []
    table = ReportTable("column", *(f"row {n}" for n in range(len(rows))), heading=entry.name)
    for name in rows[0] if rows else ():
        table.add_row(escape(name), *(escape(_cell(row[name])) for row in rows))
    return table


@contextmanager
def _opened(dataset: Dataset, entry: FileEntry) -> Iterator[BinaryIO]:
    """Raises StoreError: the file is not there, or what the block reads of it is damaged."""
    try:
        with dataset.open(entry) as file:
            yield file
    except (pa.ArrowInvalid, tarfile.TarError, OSError) as error:
        raise StoreError(f"{dataset.url(entry)}: {' '.join(str(error).split())}; {VERIFY}") from None


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return _cut(str(value), CELL)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def first_picture(dataset: Dataset) -> tuple[str, bytes] | None:
    """Name and bytes of the first picture: a PNG of the dataset, or a member of its first tar."""
    for entry in dataset.files:
        if entry.name.endswith(".png"):
            with _opened(dataset, entry) as file:
                return entry.name, file.read()
    for entry in dataset.files:
        if entry.name.endswith(".tar"):
            with _opened(dataset, entry) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.name.endswith((".jpg", ".png", ".webp")) and (content := tar.extractfile(member)):
                        return f"{entry.name}: {member.name}", content.read()
    return None


def _show_picture(name: str, data: bytes, console: Console) -> None:
    """A picture in coloured half blocks, which every terminal with colours can show."""
    if not console.is_terminal:
        console.print(f"picture: {name} (shown on a terminal)")
        return
    from rich.style import Style
    from rich.text import Text

    from unidiffuser.images import PictureError, open_picture

    try:
        image = open_picture(data)
    except PictureError as reason:
        console.print(f"picture: {name} cannot be shown ({reason})", highlight=False)
        return
    width = min(PICTURE_WIDTH, console.width)
    height = min(max(2, image.height * width // image.width // 2 * 2), 2 * width)  # a strip would fill the terminal for pages
    pixels = image.resize((width, height))
    console.print(name)
    for y in range(0, height, 2):
        line = Text()
        for x in range(width):
            above, below = pixels.getpixel((x, y)), pixels.getpixel((x, y + 1))
            line.append("▀", Style(color=f"rgb{above}".replace(" ", ""), bgcolor=f"rgb{below}".replace(" ", "")))
        console.print(line)
