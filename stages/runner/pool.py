"""Runs a phase's units on a pool of Ray actors: bounded in flight, retried when a worker dies, nothing held per row."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from stages.runner.contract import (
    Bug,
    Job,
    Phase,
    Resources,
    Stage,
    StageError,
    Unit,
    UnitRecord,
    Worker,
    in_words,
    scratch_output,
)
from stages.runner.keys import unit_keys
from unidiffuser.memory import out_of_memory

log = logging.getLogger("stages")

# A worker that dies (out of memory, node lost) is replaced, and its unit tried again this many times before the stage fails.
ATTEMPTS = 3


class PoolWorker:
    """The Ray actor: builds the phase's worker once, for its first unit, and runs units one at a time."""

    def __init__(self, job: Job, phase: Phase):
        logging.basicConfig(format="%(levelname)s %(message)s")
        log.setLevel(logging.INFO)
        self.job, self.phase = job, phase
        self.worker: Worker | None = None

    def run(self, unit: Unit, key: str) -> UnitRecord:
        # Not in the constructor: Ray takes an actor whose constructor raises for one that has died.
        worker = self.worker = self.worker or self.built()
        start = time.perf_counter()
        # Another run may be at the same unit: two that differ (the web changes) must not mix their files.
        with self.job.store.claimed(key), scratch_output(self.job.store) as out:
            if (done := self.job.unit_done(key)) is not None:
                return done
            with memory_said(f"{self.phase.name} {unit.name}", self.job, self.phase):
                worker.run(unit, out)
            return out.publish(self.job, key, unit.name, time.perf_counter() - start)

    def built(self) -> Worker:
        assert self.phase.worker is not None
        try:
            with memory_said("its models", self.job, self.phase):
                return self.phase.worker(self.job)
        except StageError:
            raise
        except Exception as error:
            raise Bug(f"{self.job.node}: {in_words(error)}") from error


def field_of(config: Any, names: Sequence[str]) -> str:
    """``batch (now 16)``: the fields to lower, with what they are."""
    return " or ".join(f"{name} (now {getattr(config, name)})" for name in names)


@contextmanager
def memory_said(what: str, job: Job, phase: Phase) -> Iterator[None]:
    """Puts memory that is not enough for `what` into a line.

    Raises:
        StageError: it was not.
    """
    try:
        yield
    except Exception as error:
        if (which := out_of_memory(error)) is None:
            raise
        fields = field_of(job.config, phase.memory)
        fix = f"lower {fields}" if fields else "take a machine with more"
        raise StageError(f"{job.node}: {which} is not enough for {what}; {fix}") from error


def gpus_each() -> float:
    """GPUs that one worker of a model takes: a whole one wherever the cluster has any."""
    return 1.0 if ray.cluster_resources().get("GPU") else 0.0


def memory_each(resources: Resources) -> int:
    """Bytes that Ray holds for one worker: what it declares, or all of the largest node, where that has less: it may do."""
    if not resources.memory:
        return 0
    return int(min(resources.memory, max(node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"])))


def pool_size(resources: Resources, units: int) -> int:
    """Workers to start: what the cluster holds, at most one a unit.

    Raises:
        StageError: the cluster cannot hold a single worker.
    """
    total = ray.cluster_resources()
    cpus, gpus, memory = total.get("CPU", 0.0), total.get("GPU", 0.0), memory_each(resources)
    taken = ((cpus, resources.cpus), (gpus, resources.gpus), (total.get("memory", 0.0), memory))
    fits = int(min(have / each if each else units for have, each in taken))
    if fits < 1:
        raise StageError(
            f"the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs, but one worker takes {resources.cpus:g} and "
            f"{resources.gpus:g}; start a larger cluster or lower the stage's resources"
        )
    return max(1, min(fits, units, resources.workers or units))


def run_pool(
    job: Job, phase: Phase, pending: Iterable[tuple[Unit, str]], units: int, done: Callable[[Unit, UnitRecord], None]
) -> None:
    """Run units on actors and call `done` for each as it finishes, in any order.

    Raises:
        StageError: a unit failed, or its worker died `ATTEMPTS` times.
        Bug: it failed in a way that no stage foresees.
    """
    resources = phase.resources(job.config)
    actor = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, memory=memory_each(resources))(PoolWorker)
    shared = ray.put(job)

    def start() -> ActorHandle:
        return cast(ActorHandle, actor.remote(shared, phase))

    waiting = iter(pending)
    again: deque[tuple[Unit, str, int]] = deque()
    idle = [start() for _ in range(pool_size(resources, units))]
    flying: dict[ray.ObjectRef, tuple[ActorHandle, Unit, str, int]] = {}
    try:
        while True:
            while idle:
                if again:
                    unit, key, attempt = again.popleft()
                elif (following := next(waiting, None)) is not None:
                    (unit, key), attempt = following, 1
                else:
                    break
                worker = idle.pop()
                flying[worker.run.remote(unit, key)] = (worker, unit, key, attempt)
            if not flying:
                return
            (ready,), _ = ray.wait(list(flying), num_returns=1)
            worker, unit, key, attempt = flying.pop(ready)
            try:
                record = ray.get(ready)
            except RayTaskError as error:
                # Ray's own error holds the worker's traceback, which the log is to have.
                if isinstance(cause := error.cause, StageError):
                    raise type(cause)(str(cause)) from error
                raise Bug(f"{job.node}: {phase.name} {unit.name} failed: {_last_line(error)}") from error
            except RayActorError as error:
                if attempt == ATTEMPTS:
                    fields = field_of(job.config, phase.memory)
                    memory = f" (of too little memory? then lower {fields})" if fields else ""
                    raise StageError(
                        f"{job.node}: the worker of {phase.name} {unit.name} died {ATTEMPTS} times: {_last_line(error)}{memory}"
                    ) from error
                log.warning("%s: the worker of %s %s died, attempt %d follows", job.node, phase.name, unit.name, attempt + 1)
                again.append((unit, key, attempt + 1))
                worker = start()
            else:
                done(unit, record)
            idle.append(worker)
    finally:
        for handle in idle + [entry[0] for entry in flying.values()]:
            ray.kill(handle)


def run_here(stage: type[Stage], job: Job) -> dict[str, list[UnitRecord]]:
    """The units of a stage in this process, one after the other, without a dataset in the end: for work beside other work.

    Raises:
        StageError: a unit failed.
    """
    records: dict[str, list[UnitRecord]] = {}
    for phase in stage.phases:
        worker, units = PoolWorker(job, phase), list(phase.plan(job, records))
        key_of = unit_keys(stage, phase, job, 0)
        keys = [unit.shared or key_of(unit) for unit in units]
        done = job.units_done(keys)
        records[phase.name] = [done.get(key) or worker.run(unit, key) for unit, key in zip(units, keys, strict=True)]
    return records


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
