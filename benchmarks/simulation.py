"""laion2B-en on a thousand workers, on paper: the real plan, runner, pool, records and commit of a download of 2.3 billion rows.

The cluster is made up and its clock jumps from one event to the next (`benchmarks.simulated`); the store is one file
(`benchmarks.bucket`). Nodes vanish and come back, some cannot be reached for a while, workers die, shards fail, hang or take
long, the store is slow, and the head is lost in the middle and another run resumes. A few shards can be done by nobody: the run
refuses, names them, and is run again with these skipped.

What becomes of each row is drawn beforehand. `lost_rows` counts the rows of which the committed dataset says anything else.
`cost_growth` is the processor time of the driver a shard at full size, over the same at a tenth of it. The driver's time is that
of its process less what the made-up cluster takes.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import typer

from benchmarks.bookkeeping import SHARD_ROWS
from benchmarks.simulated import CALM, FATES, World, number_of
from benchmarks.simulation_side import Told
from infra.store import Store
from stages.runner.contract import Job, NodeConfig, Phase, Resources

# Part of the time that the work takes after which the head is lost.
HEAD_LOST = 0.4
# Parts of the full size, and workers beside the stated ones for a tenth of it.
PARTS, CROWDS = (1, 10, 100), (0.1, 10.0)
# Workers of the table of speed-ups, and the shards that each of them has to do, and all of them at least.
SPEEDS, SHARDS_EACH, SHARDS_LEAST = (1, 2, 3, 10, 100, 1000), 50, 2000

Drive = Callable[[Path, World, float, float | None, list[str]], Told]


def play(place: Path, world: World, drive: Drive) -> list[Told]:
    """Runs of one node until it is committed: the first loses its head, others resume, and skip what is refused."""
    head_lost: float | None = HEAD_LOST * world.seconds + world.faults.come
    begins, skip = 0.0, list[str]()
    runs: list[Told] = []
    while not runs or runs[-1].ended != "committed":
        told = drive(place, world, begins, head_lost, skip)
        if told.ended != "head lost" and not told.skip and told.ended != "committed":
            raise RuntimeError(told.ended)
        runs.append(told)
        begins, head_lost, skip = told.simulated_s, None, skip + told.skip
    return runs


def lost_rows(place: Path, world: World, skipped: list[str]) -> int:
    """Rows of which the committed dataset does not say what became of them in truth, read without this project's readers."""
    database = sqlite3.connect(place / "all.bucket")
    names = ("manifest.json", "files.parquet")
    found = (database.execute("select data from objects where path like ?", (f"store/download/%/{name}",)) for name in names)
    lying = {name: row[0] for name, rows in zip(names, found, strict=True) if (row := rows.fetchone())}
    manifest = json.loads(lying["manifest.json"])
    files = manifest["files"] or pq.read_table(BytesIO(lying["files.parquet"])).to_pylist()
    fates, gone = world.fates(), [number_of(name) for name in skipped]
    truth = Counter(dict(zip(FATES, np.delete(fates, gone, axis=0).sum(0).tolist(), strict=True)))
    truth["skipped"] = SHARD_ROWS * len(gone)
    told = Counter({**manifest["stats"]["dropped"], "": manifest["stats"]["rows_out"]})
    lost = sum(abs(truth[reason] - told[reason]) for reason in truth | told)
    lost += abs(manifest["stats"]["rows_in"] - SHARD_ROWS * world.shards)
    # Every shard is there once, with the pictures that came.
    came = {number: int(rows) for number, rows in enumerate(fates[:, 0]) if number not in set(gone)}
    for entry in files:
        name, ending = entry["path"].rsplit("/", 1)[1].split(".")
        if ending == "tar":
            lost += abs(came.pop(number_of(name), -SHARD_ROWS) - entry["rows"])
    return lost + sum(came.values())


def apart(place: Path, world: World, begins: float, head_lost: float | None, skip: list[str]) -> Told:
    """A run in a process of its own."""
    return Told(**json.loads(_side(place, world, begins, head_lost, skip).splitlines()[-1]))


def _side(place: Path, world: World, *run: Any) -> str:
    arguments = [json.dumps(argument) for argument in (asdict(world), *run)]
    command = [sys.executable, "-m", "benchmarks.simulation_side", str(place), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return done.stdout


@dataclass(frozen=True)
class Found:
    """What came of one size."""

    shards: int
    workers: int
    runs: list[Told]
    lost_rows: int

    @property
    def driver_us(self) -> float:
        """Processor time of the driver a shard, in microseconds, all runs together."""
        return 1e6 * sum(told.driver_s for told in self.runs) / self.shards

    @property
    def peak_mib(self) -> float:
        return max(told.peak_mib for told in self.runs)

    @property
    def hours(self) -> float:
        """On the simulated clock."""
        return self.runs[-1].simulated_s / 3600

    def row(self) -> dict[str, Any]:
        happened = sum((Counter(told.happened) for told in self.runs), Counter[str]())
        derived = {"driver_us": round(self.driver_us, 1), "peak_mib": round(self.peak_mib), "hours": round(self.hours, 2)}
        ended = [told.ended for told in self.runs]
        size = {"shards": self.shards, "workers": self.workers, "lost_rows": self.lost_rows}
        return {**size, **derived, "runs": ended, "happened": dict(happened)}


def measured(folder: Path, shards: int, workers: int) -> Found:
    place, world = folder / f"{shards}-{workers}", World(shards, workers)
    place.mkdir()
    _side(place, world)
    runs = play(place, world, apart)
    skipped = [name for told in runs for name in told.skip]
    return Found(shards, workers, runs, lost_rows(place, world, skipped))


def simulated_speed(folder: Path, workers: int) -> tuple[int, float]:
    """Workers, and shards that they do in a simulated hour without faults."""
    world = World(max(SHARDS_LEAST, SHARDS_EACH * workers), workers, faults=CALM)
    place = folder / f"speed-{workers}"
    place.mkdir()
    _side(place, world)
    return workers, world.shards / (apart(place, world, 0.0, None, []).simulated_s / 3600)


def ray_call_us(calls: int = 500) -> float:
    """Processor time that a call of a worker takes of the driver on a real Ray, in microseconds; the worker does nothing."""
    import ray

    from stages.runner.actors import Actors

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            actors = Actors(Job(Store(folder), "empty", "laion-empty", NodeConfig(), {}, {}, {}), Phase("work"))
            worker = actors.hire(Resources())

            def call() -> float:
                actors.call(worker, "where")
                while not actors.wait(60.0):
                    pass
                return time.process_time()

            start = call()
            return 1e6 * ([call() for _ in range(calls)][-1] - start) / calls
    finally:
        ray.shutdown()


def main(
    shards: Annotated[int, typer.Option(help="Shards of the largest size; 230,000 of 10,000 rows are laion2B-en.")] = 230_000,
    workers: Annotated[int, typer.Option(help="Workers.")] = 1000,
    file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here; page and plot beside it.", metavar="FILE")
    ] = None,
) -> None:
    """Simulate a download at three sizes, with three crowds of workers, and with one to a thousand without faults."""
    import torch

    from benchmarks.frame import Result, machine
    from benchmarks.simulation_page import page, plot

    words = machine(torch.device("cpu"))
    tenth = shards // PARTS[1]
    sizes = [(shards // part, workers) for part in PARTS] + [(tenth, round(workers * crowd)) for crowd in CROWDS]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as two:
        folder = Path(name)
        found = dict(zip(sizes, two.map(lambda size: measured(folder, *size), sizes), strict=True))
        speeds = dict(two.map(partial(simulated_speed, folder), SPEEDS))
    called = round(ray_call_us())
    whole, part = found[shards, workers], found[tenth, workers]
    growth = whole.driver_us / part.driver_us
    lost = sum(each.lost_rows for each in found.values())
    figures = {
        "shards": shards, "workers": workers, "rows": shards * SHARD_ROWS, "lost_rows": lost,
        "cost_growth": round(growth, 3), "driver_us": round(whole.driver_us, 1), "memory_mib": round(whole.peak_mib),
        "ray_call_us": called,
    }  # fmt: skip
    details = {"sizes": [each.row() for each in found.values()], "shards_per_simulated_hour": speeds}
    Result("simulation", round(1 / growth, 3), "a_tenth_of_it", figures, words, details).finish(file)
    if file is not None:
        record = json.loads(file.read_text())
        file.with_suffix(".md").write_text(page(record), encoding="utf-8")
        plot(file.with_suffix(".png"), record)


if __name__ == "__main__":
    typer.run(main)
