"""How long checkpoints hold a training up, against the copy of a worker's share in memory, and what memory they take.

Two workers with ZeRO 1 train a U-ViT and write checkpoints into a store on the local disk. With `--before REV` the trainer of
that commit does the same, in turns. `blocked_over_copy` is the time that a worker stands still for a checkpoint over that of
copying its share once, all workers at the same time; `memory_ratio` is what checkpoints add to the most that rank 0 holds while
it trains, over the same of before. A step of few samples ends before a share is written, and the rest of it is copied.
"""

from __future__ import annotations

import json
import os
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

WORKERS = 2
SHAPES = {"moments": (8, 16, 16), "clip": (512,), "text": (16, 64)}
ROWS, GROUP = 256, 64


def write(folder: Path) -> None:
    """Random latents."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    columns: dict[str, Any] = {"key": [f"{row:06d}" for row in range(ROWS)]}
    for part, shape in SHAPES.items():
        cells = [draws.standard_normal(shape).astype(np.float16).tobytes() for _ in range(ROWS)]
        columns[part] = pa.array(cells, pa.binary(len(cells[0])))
    told = {"size": 128, "scaling_factor": 0.18215, **SHAPES}
    table = pa.table(columns).replace_schema_metadata({"unidiffuser": json.dumps(told)})
    pq.write_table(table, folder / "00000.parquet", row_group_size=GROUP, use_dictionary=False, write_page_checksum=True)


def train(root: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What the workers measured, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        side = [sys.executable, "-P", str(ROOT / "benchmarks" / "checkpoint_side.py")]
        workers = [
            subprocess.Popen(
                [*side, str(rank), str(WORKERS), folder, str(root), json.dumps(settings)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=sys.stderr,
            )
            for rank in range(WORKERS)
        ]
        try:
            if any([worker.wait() for worker in workers]):
                raise SystemExit("a worker ended; what it said stands above")
        finally:
            for worker in workers:
                worker.kill()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORKERS)]


def main(
    width: Annotated[int, typer.Option(min=64, help="Of the U-ViT, a multiple of 64.")] = 768,
    depth: Annotated[int, typer.Option(min=2, help="Of the U-ViT; with the width above, 100 million parameters.")] = 12,
    batch: Annotated[int, typer.Option(min=2, help="Samples of a step, two at a time on each worker.")] = 16,
    every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 2,
    checkpoints: Annotated[int, typer.Option(min=1, help="Checkpoints that are measured in a turn.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often the sides take turns.")] = 3,
    before: Annotated[str, typer.Option(help="Measure the trainer of this commit too.", metavar="REV")] = "",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Seconds for which checkpoints hold training up, and memory."""
    words = machine(torch.device("cpu"))
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory()), "latents")
        write(data)
        settings = {
            "data": str(data), "steps": every * (checkpoints + 1), "checkpoint_every": every, "global_batch": batch,
            "micro_batch": min(2, batch // WORKERS), "workers": WORKERS, "precision": "fp32", "validation": {"fraction": 0.0},
            "model": {"width": width, "depth": depth, "heads": width // 64},
        }  # fmt: skip
        roots = {"ours": ROOT}
        if before:
            roots["before"] = stack.enter_context(worktree(before))
        runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in roots}
        for number in range(rounds):
            for name in list(roots) if number % 2 == 0 else list(roots)[::-1]:
                runs[name].append(train(roots[name], dict(settings)))
                told = [{key: value for key, value in rank.items() if key != "calls"} for rank in runs[name][-1]]
                progress(f"round {number + 1} of {rounds}: {name} {told}")

    def typical(name: str, figure: str) -> float:
        return median(max(rank[figure] for rank in run) for run in runs[name])

    def of_rank_0(name: str, figure: str) -> float:
        return median(run[0][figure] for run in runs[name])

    def added(name: str) -> int:
        return round(median(run[0]["peak_mib"] - run[0]["peak_of_steps_mib"] for run in runs[name]))

    copy = typical("ours", "copy")
    figures: dict[str, Any] = {"blocked_s": typical("ours", "blocked"), "copy_s": copy}
    figures["blocked_over_copy"] = round(figures["blocked_s"] / copy, 3)
    figures |= {"added_mib": added("ours"), "peak_mib": round(of_rank_0("ours", "peak_mib"))}
    ratio = 0.0
    if before:
        ratio = round(typical("before", "blocked") / figures["blocked_s"], 2)
        figures["before_blocked_s"] = typical("before", "blocked")
        figures["before_peak_mib"] = round(of_rank_0("before", "peak_mib"))
        figures["before_added_mib"] = added("before")
        figures["memory_ratio"] = round(figures["added_mib"] / figures["before_added_mib"], 3)
    commits = {"commit": commit_of()} | ({"before": commit_of(before)} if before else {})
    sizes = {"width": width, "depth": depth, "batch": batch, "every": every, "checkpoints": checkpoints, "rounds": rounds}
    Result("checkpoint", ratio, "before", figures, words, {**commits, "sizes": sizes, "runs": runs}).finish(file)


if __name__ == "__main__":
    typer.run(main)
