"""What the pool works with: a clock, a cluster, workers on it and their answers.

On Ray that is `stages.runner.actors`; a simulation puts its own in the place, and the pool does not know.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from stages.runner.cluster import Cluster
from stages.runner.contract import Resources


class CallError(Exception):
    """A call of a worker that ended without a result; the message is one line, and the cause holds what the log is to have."""


class Raised(CallError):
    """What was called raised `error`."""

    def __init__(self, line: str, error: BaseException | None):
        super().__init__(line)
        self.error = error


class Died(CallError):
    """The worker is dead, and with `node` its node is too."""

    def __init__(self, line: str, node: bool):
        super().__init__(line)
        self.node = node


class Unreached(CallError):
    """The worker cannot be reached: the first sign of a death, or a network that is cut for a while."""


@dataclass(frozen=True)
class Answer:
    """How a call ended."""

    call: Hashable
    value: Any = None
    error: CallError | None = None


class Executor(Protocol):
    """Holds the workers of one phase, each of which is a `stages.runner.worker.PoolWorker`; what stands for one is its own."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    def cluster(self) -> Cluster:
        """The cluster as it is now."""
        ...

    def hire(self, resources: Resources) -> Any:
        """Ask for a worker; its calls are answered once it has a place."""
        ...

    def call(self, worker: Any, method: str, *arguments: Any) -> Hashable:
        """Call a method of a worker, which may have as many calls at once as its phase allows."""
        ...

    def end(self, worker: Any) -> None:
        """End a worker at once, whatever it is at."""
        ...

    def wait(self, seconds: float) -> list[Answer]:
        """The calls that have ended since the last time; waits for the first, but no longer than so many seconds."""
        ...
