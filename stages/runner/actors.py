"""Workers as Ray actors: the executor of every run that is none of a simulation."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from infra.ray_nodes import marked, missing
from stages.runner.cluster import Cluster
from stages.runner.contract import Job, Phase, Resources, StageError
from stages.runner.executor import Answer, CallError, Died, Raised, Unreached
from stages.runner.worker import PoolWorker

# What Ray's error says when an actor died because its node did.
NODE_DIED = "its node has died"


def for_workers(job: Job, phase: Phase) -> Job:
    """The job as each worker holds it, which is no larger where there are more files."""
    return job if phase.takes_sources else replace(job, sources={})


class Actors:
    """See `stages.runner.executor.Executor`.

    Ray tells of each answer as it comes: to ask for the next of all takes longer, the more of them are awaited.

    Raises:
        StageError: no machine is of the kind that the stage names.
    """

    def __init__(self, job: Job, phase: Phase):
        if (why := missing(job.config.machines)) is not None:
            raise StageError(f"{job.node}: machines: {why}")
        self.phase, self.shared = phase, ray.put(for_workers(job, phase))
        self.actor = cast(Any, ray.remote(PoolWorker))
        self.ended: SimpleQueue[tuple[ray.ObjectRef, Future[Any]]] = SimpleQueue()

    def now(self) -> float:
        return time.monotonic()

    def cluster(self) -> Cluster:
        return Cluster.seen()

    def hire(self, resources: Resources) -> ActorHandle:
        actor = self.actor.options(
            num_cpus=resources.cpus, num_gpus=resources.gpus, memory=resources.memory, resources=marked(resources.machines),
            max_concurrency=self.phase.at_once,
        ).remote(self.shared, self.phase)  # fmt: skip
        return cast(ActorHandle, actor)

    def call(self, worker: Any, method: str, *arguments: Any) -> ray.ObjectRef:
        call: ray.ObjectRef = getattr(worker, method).remote(*arguments)
        call.future().add_done_callback(partial(self._note, call))
        return call

    def _note(self, call: ray.ObjectRef, future: Future[Any]) -> None:
        self.ended.put((call, future))

    def end(self, worker: Any) -> None:
        ray.kill(worker)

    def wait(self, seconds: float) -> list[Answer]:
        answers = []
        try:
            answers.append(_answer(*self.ended.get(timeout=seconds)))
            while True:
                answers.append(_answer(*self.ended.get_nowait()))
        except Empty:
            return answers


def _answer(call: ray.ObjectRef, future: Future[Any]) -> Answer:
    if (error := future.exception()) is None:
        return Answer(call, future.result())
    if not isinstance(error, RayError):
        raise error
    found = _in_our_words(error)
    # Ray's own error holds the worker's traceback.
    found.__cause__ = error
    return Answer(call, error=found)


def _in_our_words(error: RayError) -> CallError:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    line = lines[-1].strip() if lines else type(error).__name__
    if isinstance(error, RayTaskError):
        return Raised(line, error.cause)
    return Unreached(line) if isinstance(error, ActorUnavailableError) else Died(line, NODE_DIED in str(error))
