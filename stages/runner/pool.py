"""Runs a phase's units on a pool of Ray actors: bounded in flight, retried when a worker dies, nothing held per row."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from stages.runner.contract import Job, Phase, Resources, StageError, Unit, UnitRecord, scratch_output

log = logging.getLogger("stages")

# A worker that dies (out of memory, node lost) is replaced, and its unit tried again this many times before the stage fails.
ATTEMPTS = 3


class PoolWorker:
    """The Ray actor: builds the phase's worker once and runs units one at a time."""

    def __init__(self, job: Job, phase: Phase):
        logging.basicConfig(format="%(levelname)s %(message)s")
        log.setLevel(logging.INFO)
        assert phase.worker is not None
        self.job = job
        self.worker = phase.worker(job)

    def run(self, unit: Unit, key: str) -> UnitRecord:
        start = time.perf_counter()
        # Another run may be at the same unit: two that differ (the web changes) must not mix their files.
        with self.job.store.claimed(key), scratch_output(self.job.store) as out:
            if (done := self.job.unit_done(key)) is not None:
                return done
            self.worker.run(unit, out)
            return out.publish(self.job, key, unit.name, time.perf_counter() - start)


def gpus_each() -> float:
    """GPUs that one worker of a model takes: a whole one wherever the cluster has any."""
    return 1.0 if ray.cluster_resources().get("GPU") else 0.0


def pool_size(resources: Resources, units: int) -> int:
    """Workers to start: what the cluster holds, at most one a unit.

    Raises:
        StageError: the cluster cannot hold a single worker.
    """
    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    fits = int(min(cpus / resources.cpus if resources.cpus else units, gpus / resources.gpus if resources.gpus else units))
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
    """
    resources = phase.resources(job.config)
    actor = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(PoolWorker)
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
                cause = error.cause
                if isinstance(cause, StageError):
                    raise StageError(str(cause)) from None
                raise StageError(f"{job.node}: {phase.name} {unit.name} failed: {_last_line(error)}") from error
            except RayActorError as error:
                if attempt == ATTEMPTS:
                    raise StageError(
                        f"{job.node}: the worker of {phase.name} {unit.name} died {ATTEMPTS} times: {_last_line(error)}"
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


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
