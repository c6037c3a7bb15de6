"""Starts a training run on Ray, and starts it again from its newest checkpoint when a worker or a machine is lost.

Ray must be initialised. A run whose own fault it is that it ended is not started again.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from infra.ray_nodes import free, marked, may_come, missing, total
from training.config import TrainConfig, workers_told
from training.gang.attempt import Attempt, Lost
from training.history import Row
from training.job import Outcome, TrainingError, TrainJob

log = logging.getLogger(__name__)

# Losses one after the other, none of them after a later step than the one before, at which a run gives up.
GIVE_UP = 3
# Seconds to wait for a lost machine to be known as lost, and for others in its place.
KNOWN, PATIENCE = 60.0, 600.0
# Seconds between two looks whether there is room for more workers.
LOOK = 30.0


@contextmanager
def _sigterm_sets(event: threading.Event) -> Iterator[None]:
    """Take SIGTERM as a request, while here; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train(
    plan: Callable[[], TrainJob], on_row: Callable[[Row], None] = lambda row: None, stop: threading.Event | None = None
) -> Outcome:
    """Train with the workers that the job's configuration asks for, on GPUs when the cluster has them, and wait for the end.

    SIGTERM, or setting `stop`, makes the workers write a checkpoint after the step that they are in and come to an end. A worker
    that gets SIGTERM has all write one too, and the run goes on. So it does when a worker is killed or silent, or its machine
    lost, from the newest checkpoint.

    Args:
        plan: gives what to train, before every start of a group of workers, so that its `resume` is the newest checkpoint; its
            `publish` runs in the worker of rank 0.
        on_row: called in this process with every row of the history, within a second or so; again with those of steps that are
            done again.
        stop: the caller's own request to stop.

    Returns:
        How the run ended; `stopped` is true when it was asked to stop before its last step.

    Raises:
        TrainingError: the workers failed, with the first worker's reason, or the cluster is too small, or a worker was lost
            three times at the same step.
        TrainingBug: they failed in a way that may be a fault of the program; it is caused by the worker's traceback.

    Example:
        >>> outcome = train(lambda: TrainJob(config, shards, "/tmp/work", publish), on_row=print)  # doctest: +SKIP
    """
    requested = stop or threading.Event()
    job = plan()
    room = _Room(job.config)
    furthest, losses, step = 0, 0, 0
    with _sigterm_sets(requested), room.asked_for():
        if (workers := room.at_start(requested)) is None:
            return Outcome(step, True)
        while True:
            attempt, growth = Attempt(job, workers, room.gpus), _Growth(room, workers)
            try:
                outcome = attempt.run(on_row, lambda growth=growth: requested.is_set() or growth.wanted())  # type: ignore[misc]
            except Lost as lost:
                step = max(step, attempt.step)
                losses = 1 if attempt.step > furthest else losses + 1
                furthest = max(furthest, attempt.step)
                if losses == GIVE_UP:
                    raise TrainingError(f"{lost}; lost {GIVE_UP} times by step {furthest}, so the run ends") from lost
                reason = str(lost)
                room.forget(lost.nodes)
            else:
                if requested.is_set() or not outcome.stopped:
                    return outcome
                step, reason = outcome.step, _why_stopped(attempt, outcome.step)
            if requested.is_set() or (found := room.again(requested)) is None:
                return Outcome(step, True)
            workers, job = found, plan()
            log.warning("%s; going on from the newest checkpoint with %d workers", reason, workers)


def _why_stopped(attempt: Attempt, step: int) -> str:
    termed = ", ".join(map(str, attempt.termed))
    return f"SIGTERM of {termed} at step {step}" if termed else f"more workers fit than before, at step {step}"


class _Room:
    """How many workers the cluster has room for."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises TrainingError: there is no machine of the kind that the configuration names."""
        if (why := missing(config.machines)) is not None:
            raise TrainingError(f"machines: {why}")
        self.config = config
        # Decided once: what is left of a cluster may have none.
        self.gpus = bool(total("GPU", config.machines) or may_come("GPU", config.machines))
        self.kind = "GPU" if self.gpus else "CPU"

    @contextmanager
    def asked_for(self) -> Iterator[None]:
        """While here, a cluster that grows by itself is asked for room for all workers."""
        if not may_come(self.kind, self.config.machines):
            yield
            return
        from ray.autoscaler.sdk import request_resources

        one = {self.kind: 1, **marked(self.config.machines)}
        request_resources(bundles=[one] * self.config.most_workers)
        try:
            yield
        finally:
            request_resources(bundles=[])

    def fit(self, have: int) -> int | None:
        """The greatest number of workers that is allowed and fits."""
        return max((n for n in self.config.allowed_workers if n <= have), default=None)

    def at_start(self, requested: threading.Event) -> int | None:
        """How many workers to begin with, of a cluster that grows once there is room for the fewest; None as `again`.

        Raises:
            TrainingError: the cluster is too small.
        """
        if (workers := self.fit(self._have())) is not None:
            return workers
        if may_come(self.kind, self.config.machines) < self.config.fewest_workers:
            raise self._too_small()
        log.info("waiting for machines for %d workers", self.config.fewest_workers)
        return self.again(requested)

    def again(self, requested: threading.Event) -> int | None:
        """How many workers to go on with, once there is room for the fewest; None when the run is to stop.

        Raises:
            TrainingError: the cluster stays too small.
        """
        until = time.monotonic() + PATIENCE
        while (workers := self.fit(self._have())) is None:
            if requested.wait(1.0):
                return None
            if time.monotonic() > until:
                raise self._too_small()
        return workers

    def more(self, workers: int) -> bool:
        """Whether more than so many, which run, would fit."""
        return (self.fit(workers + int(free(self.kind, self.config.machines))) or 0) > workers

    def forget(self, nodes: frozenset[str]) -> None:
        """Wait until Ray counts machines that do not answer no longer, lest a group be placed there."""
        until = time.monotonic() + KNOWN
        while time.monotonic() < until and any(node["Alive"] and node["NodeID"] in nodes for node in ray.nodes()):
            time.sleep(1.0)

    def _have(self) -> int:
        return int(total(self.kind, self.config.machines))

    def _too_small(self) -> TrainingError:
        told = workers_told(self.config)
        whose = f"machines with {self.config.machines} have" if self.config.machines else "the Ray cluster has"
        return TrainingError(f"workers is {told}, but {whose} {self._have()} {self.kind}s; lower workers")


class _Growth:
    """Whether a group is to end at its next step for a larger one: there has been room for that at two looks."""

    def __init__(self, room: _Room, workers: int) -> None:
        self.room, self.workers = room, workers
        self.looked, self.seen = time.monotonic(), 0

    def wanted(self) -> bool:
        if self.workers < self.room.config.most_workers and self.seen < 2 and time.monotonic() - self.looked > LOOK:
            self.looked = time.monotonic()
            self.seen = self.seen + 1 if self.room.more(self.workers) else 0
        return self.seen == 2
