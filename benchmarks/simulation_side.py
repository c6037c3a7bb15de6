"""One run of a simulated download in a process of its own, as `benchmarks.simulation` asks for it."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import benchmarks.bucket  # noqa: F401
from benchmarks.bookkeeping import make_input
from benchmarks.simulated import Download, Faults, HeadLost, World
from infra.store import Store
from stages.catalog import stage_class
from stages.download.stage import Download as DownloadStage
from stages.runner import pool
from stages.runner.contract import StageError
from stages.runner.executor import Answer
from stages.runner.graph import Planned, plan
from stages.runner.recipe import parse_recipe
from stages.runner.run import run_stage

SKIP = re.compile(r"skip: \[(.*)\]")


@dataclass
class Told:
    """What came of one run: how it ended, when on the simulated clock, what it took and what happened."""

    ended: str = "committed"
    skip: list[str] = field(default_factory=list)
    simulated_s: float = 0.0
    driver_s: float = 0.0
    peak_mib: float = 0.0
    happened: dict[str, int] = field(default_factory=dict)


class Metered(Download):
    """The cluster, which knows the processor time that it takes itself."""

    seconds = 0.0

    def _metered(self, method: Any, *arguments: Any) -> Any:
        start = time.thread_time()
        try:
            return method(*arguments)
        finally:
            self.seconds += time.thread_time() - start

    def hire(self, *arguments: Any) -> Any:
        return self._metered(super().hire, *arguments)

    def call(self, *arguments: Any) -> Any:
        return self._metered(super().call, *arguments)

    def end(self, *arguments: Any) -> None:
        self._metered(super().end, *arguments)

    def wait(self, seconds: float) -> list[Answer]:
        return self._metered(super().wait, seconds)  # type: ignore[no-any-return]


def store_in(place: Path) -> Store:
    return Store(f"bucket://{place}/all.bucket/store")


def planned(place: Path, store: Store, skip: Iterable[str] = ()) -> dict[str, Planned]:
    """The plan of a recipe with one subset of which select is there."""
    # Shorter than it takes to be sure that a shard hangs, as for a web whose hosts are all fast.
    download = {"skip": list(skip), "shard_deadline": 60.0}
    document = {"name": "laion", "subsets": {"web": {"select": {"metadata": ["*.parquet"]}, "download": download}}}
    return plan(parse_recipe(document, place), store)


def prepare(place: Path, shards: int) -> None:
    """A store in which select has given so many shards."""
    for number in range(128):
        (place / f"part-{number:05d}.parquet").write_bytes(b"%d" % number)
    store = store_in(place)
    make_input(store, shards, planned(place, store)["web-select"].fingerprint)


def drive(place: Path, world: World, begins: float, head_lost: float | None, skip: list[str]) -> Told:
    """Run the node until it is committed, refused or the head is lost; the times are those of the simulated clock."""
    before, told, store = time.process_time(), Told(), store_in(place)
    made = Metered(world, begins, head_lost)
    made.seconds = time.process_time() - before
    node = planned(place, store, skip)["web-download"]
    try:
        with patch.object(pool, "run_pool", made.run_pool):
            run_stage(node, store, DownloadStage)
    except HeadLost:
        told.ended = "head lost"
    except StageError as error:
        told.ended = str(error)
        found = SKIP.search(told.ended)
        told.skip = found[1].split(", ") if found else []
    store.fs.refuses = None
    told.driver_s = time.process_time() - before - made.seconds
    told.simulated_s, told.happened = made.time, dict(made.happened)
    # Not getrusage's, which is no smaller than the memory of the process that started this one.
    told.peak_mib = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return told


def main() -> None:
    """``python -m benchmarks.simulation_side PLACE WORLD [BEGINS HEAD_LOST SKIP]``, all but the first as JSON; without the last
    three the store is made."""
    logging.disable()
    place, (world, *run) = Path(sys.argv[1]), [json.loads(argument) for argument in sys.argv[2:]]
    if not run:
        prepare(place, world["shards"])
        return
    # What has to be imported is no cost of a shard.
    stage_class("select")
    faults = Faults(**world.pop("faults"))
    told = drive(place, World(**world, faults=faults), *run)
    print(json.dumps(asdict(told)))


if __name__ == "__main__":
    main()
