"""The select stage against DuckDB: the same conditions and de-duplication over the same synthetic LAION files.

Each side runs in a process of its own, watched from outside. Ray is started before the clock; starting its workers and what else
does not depend on the rows is measured by the same stage on a file of a thousand rows, and told apart. With `--before REV` the
stage of that commit takes its turns too.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import pyarrow.parquet as pq
import typer

from benchmarks.before import ROOT, commit_of, worktree
from benchmarks.laion_rows import FILE_ROWS, metadata_file, write_metadata
from benchmarks.watch import Watch

CONDITIONS = {"min_side": 256, "min_similarity": 0.28, "max_punsafe": 0.5, "max_pwatermark": 0.8}
# In DuckDB, what `stages/select/stage.py` says of rows: first the conditions, then no earlier row with the same URL, nor hash.
QUERY = """
copy (
  with rows as (
    select trim(URL) as url, trim(TEXT) as caption, WIDTH as width, HEIGHT as height, similarity, punsafe, pwatermark, hash,
           filename, file_row_number
    from read_parquet({files}, filename = true, file_row_number = true)
  ), picked as (
    select * from rows
    where url <> '' and regexp_matches(url, '^(?i:https?)://[^\\s/?#]+') and caption <> ''
      and (least(width, height) >= 256) is not false and (similarity >= 0.28::float) is not false
      and (punsafe <= 0.5::float) is not false and (pwatermark <= 0.8::float) is not false
  ), marked as (
    select *, row_number() over (partition by url order by filename, file_row_number) as nth_of_url,
           row_number() over (partition by hash order by filename, file_row_number) as nth_of_hash
    from picked
  )
  select url, caption, width, height, similarity, punsafe, pwatermark, hash from marked
  where nth_of_url = 1 and (hash is null or nth_of_hash = 1)
) to '{out}' (format parquet, compression zstd)
"""
TOTALS = "select count(*), sum(hash(url, caption, width, height, similarity, hash)::hugeint) from read_parquet({files})"


def ours(files: list[str], out: str) -> dict[str, Any]:
    """The stage on a Ray of its own: seconds of starting Ray, of the stage, and of the stage on next to nothing."""
    from infra.external import resolve
    from infra.store import Store
    from stages.__main__ import connect_ray
    from stages.runner.graph import Planned
    from stages.runner.run import run_stage
    from stages.select.stage import Select

    start = time.perf_counter()
    connect_ray()
    seconds = {"ray_start": time.perf_counter() - start}
    store = Store(out)
    small = Path(out, "small.parquet")
    pq.write_table(metadata_file(0, rows=1000), small)
    for name, paths in (("start_up", [str(small)]), ("stage", files)):
        config = Select.Config.model_validate({"metadata": paths, **CONDITIONS})
        # What `unidiffuser` does in its plan, before the stage: the digests of the files.
        sources = resolve(paths, store)
        planned = Planned("benchmark", "benchmark-select", "select", config, {}, {}, sources, {}, 0, name)
        start = time.perf_counter()
        dataset = run_stage(planned, store, Select)
        seconds[name] = time.perf_counter() - start
    return {"seconds": seconds, "files": [dataset.url(entry) for entry in dataset.files]}


def duckdb(files: list[str], out: str) -> dict[str, Any]:
    """DuckDB's defaults: all cores, and no bound on its memory but the machine's."""
    import duckdb

    result = str(Path(out, "result.parquet"))
    connection = duckdb.connect()
    start = time.perf_counter()
    connection.execute(QUERY.format(files=files, out=result))
    return {"seconds": {"stage": time.perf_counter() - start, "start_up": 0.0}, "files": [result]}


SIDES = {"ours": ours, "duckdb": duckdb}


def group(process: psutil.Process) -> str:
    """The driver, Ray's workers that do the stage's work, and what Ray runs beside them."""
    name = " ".join(process.cmdline()[:2])
    if "benchmarks.select" in " ".join(process.cmdline()[:4]):
        return "stage"
    return "stage" if "PoolWorker" in name else "ray"


def measure(side: str, root: Path, files: list[Path], folder: Path) -> dict[str, Any]:
    """One run of a side in a new process, with the code of `root`."""
    import duckdb as checker

    called = "duckdb" if side == "duckdb" else "ours"
    with tempfile.TemporaryDirectory(dir=folder) as out:
        watch = Watch(group)
        command = [sys.executable, "-m", "benchmarks.select", "--side", called, "--out", out, *map(str, files)]
        printed = watch.run(command, root)
        found = json.loads(printed.strip().splitlines()[-1])
        totals = checker.connect().execute(TOTALS.format(files=found["files"])).fetchall()[0]
    rows, seconds = len(files) * FILE_ROWS, found["seconds"]
    work = seconds["stage"] - seconds["start_up"]
    run = {
        "side": side, "rows": rows, "rows_out": totals[0], "rows_per_s": round(rows / work), "seconds": seconds,
        "cpu_seconds": {name: round(value, 1) for name, value in watch.cpu.items()},
        "peak_mib": {name: round(value) for name, value in watch.peak.items()},
    }  # fmt: skip
    print(json.dumps(run), file=sys.stderr, flush=True)
    return {**run, "totals": [str(total) for total in totals]}


def main(
    files: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    millions: Annotated[str, typer.Option(help="Sizes, in million rows; the last one gives the ratio.")] = "1,3,10",
    rounds: Annotated[int, typer.Option(help="Runs of each side at each size; the fastest counts.", min=1)] = 2,
    folder: Annotated[Path, typer.Option(help="Where the rows are made and stay, and where both sides write.")] = Path(
        "runs/benchmark-select"
    ),
    side: Annotated[str, typer.Option(hidden=True)] = "",
    out: Annotated[str, typer.Option(hidden=True)] = "",
    before: Annotated[str, typer.Option(help="Measure the stage of this commit too.", metavar="REV")] = "",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Compare the select stage with DuckDB."""
    if side:
        print(json.dumps(SIDES[side](files or [], out)))
        return
    # Not above: the sides must not pay for importing torch.
    import torch

    from benchmarks.frame import Result, machine

    words = machine(torch.device("cpu"))
    sizes = [int(size) for size in millions.split(",")]
    paths = [path.resolve() for path in write_metadata(folder, max(sizes))]
    table: list[dict[str, Any]] = []
    with ExitStack() as stack:
        roots = dict.fromkeys(SIDES, ROOT) | ({"before": stack.enter_context(worktree(before))} if before else {})
        for size in sizes:
            runs = []
            for number in range(rounds):
                order = list(roots) if number % 2 == 0 else list(reversed(roots))
                runs += [measure(name, roots[name], paths[:size], folder.resolve()) for name in order]
            if len({tuple(run.pop("totals")) for run in runs}) != 1:
                raise SystemExit(f"{size} million rows: the sides disagree: {[(run['side'], run['rows_out']) for run in runs]}")
            table += runs
    best = {
        name: max(
            (run for run in table if run["side"] == name and run["rows"] == sizes[-1] * FILE_ROWS),
            key=lambda run: run["rows_per_s"],
        )
        for name in roots
    }
    figures = {
        "rows_per_s": best["ours"]["rows_per_s"],
        "peer_rows_per_s": best["duckdb"]["rows_per_s"],
        "memory_mib": best["ours"]["peak_mib"]["stage"],
        "ray_mib": best["ours"]["peak_mib"].get("ray", 0),
        "peer_memory_mib": best["duckdb"]["peak_mib"]["stage"],
        "start_up_s": round(best["ours"]["seconds"]["start_up"], 1),
    }
    if before:
        figures["before_rows_per_s"] = best["before"]["rows_per_s"]
        # Of the whole stage, which is what a person waits for: the commits divide it otherwise into start and work.
        whole = {
            name: median(run["seconds"]["stage"] for run in table if run["side"] == name and run["rows"] == sizes[-1] * FILE_ROWS)
            for name in ("ours", "before")
        }
        figures["over_before"] = round(whole["before"] / whole["ours"], 3)
    ratio = round(best["ours"]["rows_per_s"] / best["duckdb"]["rows_per_s"], 3)
    commits = {"commit": commit_of()} | ({"before": commit_of(before)} if before else {})
    Result("select", ratio, "duckdb", figures, words, {**commits, "conditions": CONDITIONS, "runs": table}).finish(file)


if __name__ == "__main__":
    typer.run(main)
