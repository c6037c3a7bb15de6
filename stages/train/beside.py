"""Work on the checkpoints of a training while it goes on: never at its cost, one at a time, and what fails is a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

from stages.runner.chain import Chain
from stages.runner.contract import UnitRecord

log = logging.getLogger("stages")

# How long a finished training waits for the work that is begun, in seconds.
PATIENCE = 120.0


class Beside:
    """Begins work on the newest checkpoint that is due, when none is going on.

    Class attributes:
        what: the result in words.

    Attributes:
        every: steps between two checkpoints that are due; 0 for none.
        gpus: share of a GPU that the work takes.
    """

    what: ClassVar[str]

    def __init__(self, chain: Chain, every: int, gpus: float) -> None:
        self.job, self.chain, self.every, self.gpus = chain.job, chain, every, gpus
        self.last = 0
        self.running: Any = None

    def work(self, step: int, record: UnitRecord) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What a worker is to call, and with what."""
        raise NotImplementedError

    def finished(self, step: int, result: Any) -> None:
        """Tell of what came of it."""
        raise NotImplementedError

    def seen(self, step: int) -> None:
        """Training is past `step`: take what is ready, and begin with the last checkpoint before this step that is due."""
        if self.every == 0:
            return
        if self.running is not None:
            self._collect(0.0)
        due = step - 1 - (step - 1) % self.every
        if due > self.last and self.running is None and (record := self.chain.record(due)) is not None:
            self._begin(due, record)

    def close(self) -> None:
        """Training has come to its end: wait for what is going on."""
        if self.running is not None:
            self._collect(PATIENCE)

    def _begin(self, step: int, record: UnitRecord) -> None:
        import ray

        self.last = step
        try:
            function, arguments = self.work(step, record)
        except Exception as error:
            self._failed(error)
            return
        remote: Any = ray.remote(num_cpus=0, num_gpus=self.gpus, max_retries=0)(function)
        self.running = remote.remote(*arguments)

    def _collect(self, patience: float) -> None:
        import ray

        if not ray.wait([self.running], timeout=patience)[0]:
            return
        try:
            self.finished(self.last, ray.get(self.running))
        except Exception as error:
            self._failed(error)
        self.running = None

    def _failed(self, error: Exception) -> None:
        reason = str(error).strip().splitlines()[-1]
        log.warning("%s: no %s at step %d: %s", self.job.node, self.what, self.last, reason)
