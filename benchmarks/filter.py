"""The filter's search for near duplicates, of random looks of which half are one picture in many encodings.

With `--before REV` the search of that commit does the same, in turns; `ratio` is its time over ours. `append_share` is the time
of one more shard, after a search over all others, over the time of that search.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from benchmarks.before import ROOT, commit_of, worktree
from benchmarks.frame import Result, machine, progress

# Of the 256 bits of a hash, how many an encoding moves, about: 2.5 from the picture, 5 between two encodings.
MOVED = 0.01


def write(folder: Path, rows: int, shards: int, copies: float) -> None:
    """Scores of so many shards, and of one more."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    picture, shade = chance.random(256) < 0.5, chance.integers(40, 200, 48)
    for shard in range(shards + 1):
        count = rows // shards
        same = chance.random(count) < copies
        bits = np.where(same[:, None], picture ^ (chance.random((count, 256)) < MOVED), chance.random((count, 256)) < 0.5)
        shades = np.where(same[:, None], shade + chance.integers(-4, 5, (count, 48)), chance.integers(0, 256, (count, 48)))
        sides = np.where(same, chance.integers(256, 1024, count), 512).astype(np.int32)
        none = pa.nulls(count, pa.float32())
        columns: dict[str, Any] = {
            "key": [f"{shard:05d}{row:08d}" for row in range(count)],
            "caption": ["a picture of something"] * count,
            "fault": pa.nulls(count, pa.string()),
            "width": sides,
            "height": sides,
            "phash": pa.array([row.tobytes() for row in np.packbits(bits, axis=1)], pa.binary(32)),
            "colours": pa.array([row.tobytes() for row in shades.astype(np.uint8)], pa.binary(48)),
            **dict.fromkeys(("clip_similarity", "similarity", "punsafe", "pwatermark", "aesthetic"), none),
        }
        pq.write_table(pa.table(columns), folder / f"{shard:05d}.parquet", write_page_checksum=True)


def search(root: Path, store: Path, shards: int) -> dict[str, Any]:
    """What one side measured, in a process of its own."""
    side = [sys.executable, "-P", str(ROOT / "benchmarks" / "filter_side.py"), str(root), str(store), str(shards)]
    printed = subprocess.run(side, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: dict[str, Any] = json.loads(printed.stdout.splitlines()[-1])
    return {**found, "all": sum(found["seconds"].values())}


def main(
    rows: Annotated[int, typer.Option(min=100, help="Pictures that are searched.")] = 20_000,
    shards: Annotated[int, typer.Option(min=1, help="Shards that they lie in; one more of the same size is appended.")] = 20,
    copies: Annotated[float, typer.Option(min=0, max=1, help="Part of them that is one picture.")] = 0.5,
    rounds: Annotated[int, typer.Option(min=1, help="How often the sides take turns.")] = 3,
    before: Annotated[str, typer.Option(help="Measure the search of this commit too.", metavar="REV")] = "",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Seconds, memory and disk of the search for near duplicates."""
    words = machine(torch.device("cpu"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write(folder / "scores", rows, shards, copies)
        roots = {"ours": ROOT} | ({"before": stack.enter_context(worktree(before))} if before else {})
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in roots}
        for number in range(rounds):
            for name in list(roots) if number % 2 == 0 else list(roots)[::-1]:
                run = search(roots[name], folder, shards)
                runs[name].append({**run, "append": search(roots[name], folder, shards + 1)["all"]})
                shutil.rmtree(folder / "filter")
                progress(f"round {number + 1} of {rounds}: {name} {runs[name][-1]}")

    def typical(name: str, figure: str) -> float:
        return median(run[figure] for run in runs[name])

    figures: dict[str, Any] = {"seconds": typical("ours", "all")}
    figures["append_share"] = round(typical("ours", "append") / figures["seconds"], 3)
    figures |= {name: typical("ours", name) for name in ("peak_mib", "disk_mib", "gone")}
    ratio = 0.0
    if before:
        ratio = round(typical("before", "all") / figures["seconds"], 2)
        figures |= {f"before_{name}": typical("before", name) for name in ("peak_mib", "disk_mib", "gone")}
        figures["before_append_share"] = round(typical("before", "append") / typical("before", "all"), 3)
    commits = {"commit": commit_of()} | ({"before": commit_of(before)} if before else {})
    sizes = {"rows": rows, "shards": shards, "copies": copies, "rounds": rounds}
    Result("filter", ratio, "before", figures, words, {**commits, "sizes": sizes, "runs": runs}).finish(file)


if __name__ == "__main__":
    typer.run(main)
