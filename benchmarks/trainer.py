"""The whole trainer against a bare loop in plain torch on tensors that are there, at two sizes: what reading, ZeRO, sums, the
history and all that a person watches cost of a step.

Both do the same mathematics: loss, backward pass, clipping, AdamW, moving average. Each side has a process of its own with one
torch thread, and they take turns of some steps; a ratio is that of the medians, and the smaller of two counts. What watching
alone costs (sums by noise level, means, a row) is timed by itself, and given as a share of the step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
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
from benchmarks.loader_side import GROUP, SCALE, SHAPES
from training.history import Meter
from training.losses import Losses
from training.speed import gauges
from unidiffuser.modalities import all_parts, paper_modalities
from unidiffuser.objective import JointObjective
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.uvit import UViTConfig

SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 192, "depth": 4, "batch": 16, "zero_stage": 1},
    "large": {"width": 512, "depth": 4, "batch": 8, "zero_stage": 1},
}
ROWS = 2048


def write(folder: Path, rows: int) -> None:
    """Random latents of 256 px."""
    random = np.random.default_rng(0)
    columns: dict[str, Any] = {"key": [f"{row:06d}" for row in range(rows)]}
    for part, shape in SHAPES.items():
        cells = random.standard_normal((rows, int(np.prod(shape))), np.float32).astype(np.float16)
        columns[part] = pa.array([cell.tobytes() for cell in cells], pa.binary(cells[0].nbytes))
    facts = json.dumps({"size": 256, "scaling_factor": SCALE, **SHAPES})
    table = pa.table(columns).replace_schema_metadata({"unidiffuser": facts})
    pq.write_table(
        table, folder / "0.parquet", row_group_size=GROUP, compression="none", use_dictionary=False, write_page_checksum=True
    )


def start(side: str, data: Path, root: Path, sizes: dict[str, int]) -> subprocess.Popen[str]:
    script = str(ROOT / "benchmarks" / "trainer_side.py")
    command = [sys.executable, "-P", script, side, str(data), str(root), json.dumps(sizes)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure(process: subprocess.Popen[str], steps: int) -> dict[str, float]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    # DeepSpeed says a few lines of its own.
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("a side ended; what it said stands above")


def watching(sizes: dict[str, int], times: int = 200) -> float:
    """Seconds a step of all that is only for a person to watch."""
    device, schedule, modalities = torch.device("cpu"), NoiseSchedule(), paper_modalities((4, 32, 32))
    objective = JointObjective(modalities, schedule)
    losses, subset = Losses(objective, schedule.steps, device), torch.zeros(sizes["batch"], dtype=torch.int64)
    parts = all_parts(modalities)
    errors = {part.name: torch.rand(sizes["batch"]) for part in parts}
    timesteps = {modality.name: torch.randint(1, 1001, (sizes["batch"],)) for modality in modalities}
    model = UViTConfig(width=sizes["width"], depth=sizes["depth"], heads=sizes["width"] // 64, modalities=modalities)
    meter = Meter(sizes["batch"], lambda step: {"epoch": step / 100}, 10, gauges(model, "fp32", device, 1, False))
    loss, means = objective.mean(errors)
    taken = []
    for step in range(1, times + 1):
        started = time.perf_counter()
        for _ in meter.waited(["batch"]):
            totals = torch.zeros(1 + losses.size)
            totals[1:] += losses.pack(loss, means, errors, timesteps, subset, 1.0)
            values, sums = losses.unpack(totals.tolist()[1:], 1)
            meter.step(step, 1e-4, values, sums)
        taken.append(time.perf_counter() - started)
    return sum(taken) / times


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of a turn.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often the sides take turns, at each size.")] = 9,
    before: Annotated[str, typer.Option(help="Measure the trainer of this commit too.", metavar="REV")] = "",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Steps a second of the whole trainer over those of a bare loop."""
    torch.set_num_threads(1)
    words = machine(torch.device("cpu"))
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write(data, ROWS)
        roots = {"trainer": ROOT, "bare": ROOT} | ({"before": stack.enter_context(worktree(before))} if before else {})
        for size, sizes in SIZES.items():
            sides = {name: start(name, data, root, sizes) for name, root in roots.items()}
            try:
                found[size] = compared(size, sides, steps, rounds)
            finally:
                for process in sides.values():
                    process.kill()
                    process.wait()
            found[size]["watching_share"] = watching(sizes) / found[size]["medians"]["trainer"]["seconds"]
    figures: dict[str, Any] = {f"{size}_ratio": round(result["ratio"], 3) for size, result in found.items()}
    if before:
        figures["before_ratio"] = round(min(result["before_ratio"] for result in found.values()), 3)
    figures["watching_percent"] = round(100 * max(result["watching_share"] for result in found.values()), 3)
    commits = {"commit": commit_of()} | ({"before": commit_of(before)} if before else {})
    details = {**commits, "sizes": SIZES, "steps": steps, "found": found}
    ratio = round(min(result["ratio"] for result in found.values()), 3)
    Result("trainer", ratio, "bare_loop", figures, words, details).finish(file)


def compared(size: str, sides: dict[str, subprocess.Popen[str]], steps: int, rounds: int) -> dict[str, Any]:
    """Seconds a step of each side, their medians, and the bare loop's over the trainers'."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    # Not kept: the first turns hold what happens once.
    for process in sides.values():
        measure(process, 1)
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            runs[name].append(measure(sides[name], steps))
            progress(f"{size}, round {number + 1} of {rounds}: {name} {runs[name][-1]['seconds']:.3f} s a step")
    medians = {name: {key: median(run[key] for run in taken) for key in taken[0]} for name, taken in runs.items()}
    result: dict[str, Any] = {"runs": runs, "medians": medians}
    for name in sides:
        if name != "bare":
            prefix = "" if name == "trainer" else f"{name}_"
            for key, what in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
                result[prefix + what] = medians["bare"][key] / medians[name][key]
    return result


if __name__ == "__main__":
    typer.run(main)
