"""A download on a cluster that is made up: what happens to its nodes, workers and shards, by chance with a seed.

What becomes of the rows of a shard is decided by its number alone, so that it can be counted without a run.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.bookkeeping import SHARD_ROWS
from infra.dataset import FileEntry, Stats
from stages.runner.contract import Job, Phase, Unit, UnitRecord, attempts_folder, write_record
from stages.runner.executor import Died, Raised
from stages.runner.pool import run_pool
from tests.stages.paper_cluster import Actor, Ending, PaperCluster

# What becomes of a link: about a third of LAION's are dead.
FATES = {
    "": 0.66, "http_404": 0.14, "dns": 0.08, "timeout": 0.05, "http_403": 0.03, "not_an_image": 0.02, "connection": 0.015,
    "http_503": 0.005,
}  # fmt: skip
# CPUs of a node, each of them a worker; rows that a worker begins in a second; and seconds for which the last hosts of a shard
# are waited for, while the next shard begins.
CPUS, PACE, LAST_HOSTS = 8, 59.0, (5.0, 60.0)
# Seconds until a worker is ready.
READY = 20.0
HOUR = 3600.0
# What the store refuses: of a driver that is lost all, and while it is slow the packs, which are copies.
ALL, PACKS = "", "/packs/"


@dataclass(frozen=True)
class Faults:
    """How often what goes wrong. Times are seconds; `per_hour` counts for one node, other parts for one try at a shard.

    Attributes:
        come: time within which all nodes come.
        lost_per_hour, away: a node vanishes with all on it, and another comes in its place.
        cut_per_hour, cut: a node cannot be reached, and works on; what is longer than the pool's patience costs its workers.
        killed: the worker dies alone, as one that takes too much memory.
        refused, twice: shards whose first try, and whose second try too, ends with an error of the store.
        slow, slower: tries that take so many times as long.
        hangs: tries that never end.
        slow_store: hours between two times at which the store is slow and refuses packs, how long that takes, and how long a
            shard then takes more.
        poison: shards that nobody can do: one raises, one kills its worker, one hangs, and so on.
    """

    come: float = 300.0
    lost_per_hour: float = 0.25
    away: tuple[float, float] = (300.0, 3600.0)
    cut_per_hour: float = 0.1
    cut: tuple[float, float] = (5.0, 120.0)
    killed: float = 0.001
    refused: float = 0.02
    twice: float = 0.002
    slow: float = 0.01
    slower: float = 8.0
    hangs: float = 0.0002
    slow_store: tuple[float, float, float] = (3.0, 900.0, 300.0)
    poison: int = 3


# Nothing fails, and some shards take longer than others.
CALM = Faults(
    come=0, lost_per_hour=0, cut_per_hour=0, killed=0, refused=0, twice=0, hangs=0, slow_store=(math.inf, 0, 0), poison=0
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """What is simulated."""

    shards: int
    workers: int
    seed: int = 0
    faults: Faults = Faults()

    def fates(self) -> np.ndarray:
        """Rows of each shard by what becomes of them, in the order of `FATES`: (shards, fates)."""
        chance = np.random.default_rng([self.seed, 1])
        return chance.multinomial(SHARD_ROWS, list(FATES.values()), size=self.shards).astype(np.int32)

    def refusals(self) -> np.ndarray:
        """Tries at each shard that the store refuses: (shards,)."""
        drawn = np.random.default_rng([self.seed, 2]).random(self.shards)
        return (drawn < self.faults.refused).astype(np.int8) + (drawn < self.faults.twice)

    def poison(self) -> dict[int, str]:
        """The shards that nobody can do, and what they do."""
        chosen = random.Random(self.seed).sample(range(self.shards), self.faults.poison)
        return {number: ("raises", "kills", "hangs")[place % 3] for place, number in enumerate(chosen)}

    @property
    def seconds(self) -> float:
        """About how long it takes without faults."""
        return self.shards * SHARD_ROWS / PACE / self.workers


def number_of(name: str) -> int:
    """The number of the shard of this name, as `benchmarks.bookkeeping.make_input` gives them."""
    _, part, shard = name.split("-")
    return int(part) * 2000 + int(shard)


class HeadLost(BaseException):
    """The machine that a run's driver is on went away."""


class Download(PaperCluster):
    """The cluster of a download.

    Attributes:
        happened: how often what went wrong.
    """

    def __init__(self, world: World, begins: float = 0.0, head_lost: float | None = None) -> None:
        super().__init__(self._begun, start=READY, time=begins)
        self.world, self.faults = world, world.faults
        self.chance = random.Random(f"{world.seed} {begins}")
        self.fates, self.refusals, self.poison = world.fates(), world.refusals(), world.poison()
        self.happened: Counter[str] = Counter()
        self.named = 0
        for place in range(0, world.workers, CPUS):
            cpus = min(CPUS, world.workers - place)
            self.after(self.chance.uniform(0, self.faults.come), partial(self._come, cpus))
        self._again(self.faults.slow_store[0] * HOUR, self._slow_store)
        self.slow_until = 0.0
        if head_lost is not None:
            self.at(head_lost, self._lose_head)

    def run_pool(
        self, job: Job, phase: Phase, pending: Iterable[tuple[Unit, str]], units: int, done: Callable[[Unit, UnitRecord], None]
    ) -> None:
        """In place of `stages.runner.pool.run_pool`: the same with this cluster."""
        self.job, self.at_once = job, phase.at_once
        run_pool(job, phase, pending, units, done, self)

    # Nodes.

    def _come(self, cpus: int) -> None:
        node = f"node-{self.named}"
        self.named += 1
        self.add(node, float(cpus))
        if self.faults.lost_per_hour:
            self.after(self.chance.expovariate(self.faults.lost_per_hour / HOUR), partial(self._vanish, node, cpus))
        if self.faults.cut_per_hour:
            self._again(HOUR / self.faults.cut_per_hour, partial(self._cut, node))

    def _again(self, mean: float, event: Callable[[], object]) -> None:
        """An event at random times, so far apart in the mean, until it gives False."""

        def happens() -> None:
            if event() is not False:
                self._again(mean, event)

        if mean < math.inf:
            self.after(self.chance.expovariate(1 / mean), happens)

    def _vanish(self, node: str, cpus: int) -> None:
        self.happened["nodes that vanished"] += 1
        self.lose(node)
        self.after(self.chance.uniform(*self.faults.away), partial(self._come, cpus))

    def _cut(self, node: str) -> bool:
        if node not in self.nodes:
            return False
        self.happened["nodes that could not be reached for a while"] += 1
        until = self.time + self.chance.uniform(*self.faults.cut)
        for actor in [actor for actor in self.actors if actor.node == node]:
            self.silence(actor, until)
        return True

    def _slow_store(self) -> None:
        self.happened["times at which the store was slow"] += 1
        self.slow_until = self.time + self.faults.slow_store[1]
        self.job.store.fs.refuses = PACKS
        self.at(self.slow_until, self._well_again)

    def _well_again(self) -> None:
        self.job.store.fs.refuses = None

    def _lose_head(self) -> None:
        """Some of what the workers were at is done, and the driver has not heard of it."""
        running = [call.given for actor in self.actors for call in actor.running if call.method == "run"]
        for unit, key, _ in running:
            if number_of(unit.name) not in self.poison and self.chance.random() < 0.1:
                self.happened["shards that were done when nobody heard of it"] += 1
                self._publish(unit, key, seconds=1.0)
        self.job.store.fs.refuses = ALL
        raise HeadLost

    # Shards.

    def _begun(self, actor: Actor, unit: Unit, key: str) -> tuple[float, float, Ending]:
        self.happened["tries"] += 1
        chance, faults, number = self.chance, self.faults, number_of(unit.name)
        room = unit.rows / PACE * chance.uniform(0.8, 1.2)
        if chance.random() < faults.slow:
            self.happened["shards that took long"] += 1
            room *= faults.slower
        seconds = room + chance.uniform(*LAST_HOSTS)
        if self.time + seconds < self.slow_until:
            seconds += chance.uniform(0, faults.slow_store[2])
        if (poison := self.poison.get(number)) is not None or self.refusals[number] > 0:
            return self._fails(number, poison, room, seconds)
        drawn = chance.random()
        if drawn < faults.killed:
            self.happened["workers that died alone"] += 1
            return room, seconds / 2, partial(_die, "Worker exits by signal 9.")
        if drawn < faults.killed + faults.hangs:
            self.happened["shards that hung"] += 1
            return room, math.inf, _nothing
        return room, seconds, partial(self._publish, unit, key, seconds)

    def _fails(self, number: int, poison: str | None, room: float, seconds: float) -> tuple[float, float, Ending]:
        self.happened["tries that failed for the shard's own reasons" if poison else "tries that the store refused"] += 1
        if poison is None:
            self.refusals[number] -= 1
            return room, seconds, partial(_raise, OSError("503 Slow Down"))
        if poison == "kills":
            return room, seconds / 2, partial(_die, "Worker exits by signal 11.")
        return (room, seconds, partial(_raise, ValueError("no shard"))) if poison == "raises" else (room, math.inf, _nothing)

    def _publish(self, unit: Unit, key: str, seconds: float) -> Any:
        """The record of a shard, as its worker writes it and as the driver receives it: a copy that shares nothing."""
        record = write_record(self.job, self.record(unit, key, seconds))
        return pickle.loads(pickle.dumps(record))

    def record(self, unit: Unit, key: str, seconds: float) -> UnitRecord:
        number = number_of(unit.name)
        came, *lost = self.fates[number].tolist()
        digest = hashlib.sha256(key.encode()).hexdigest()
        folder = f"{attempts_folder(self.job.stage, key)}/@{digest[:8]}"
        table = FileEntry(f"{folder}/{unit.name}.parquet", unit.rows, unit.rows * 200, digest, key)
        tar = FileEntry(f"{folder}/{unit.name}.tar", came, came * 50_000, digest, key)
        dropped = {reason: rows for reason, rows in zip([*FATES][1:], lost, strict=True) if rows}
        stats = Stats(unit.rows, came, dropped)
        return UnitRecord(key, unit.name, [table, tar], stats, {"hash_mismatch": 0}, seconds)


def _nothing() -> None: ...


def _die(line: str) -> None:
    raise Died(line, node=False)


def _raise(error: Exception) -> None:
    raise Raised(f"{type(error).__name__}: {error}", error)
