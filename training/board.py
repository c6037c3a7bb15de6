"""Between the workers of a training run and its driver: rows of the history and signs of life go one way, the request to stop
the other.

A signal handler in the workers could not do this: the driver may be on another machine.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from training.gang.signs import HERE, Sign
from training.history import Row

POST_SECONDS = 0.5
# The newest sign of every rank, and the seconds since it came.
Heard = dict[int, tuple[Sign, float]]


@ray.remote(num_cpus=0)
class Board:
    """Rows that the driver has not read yet, the newest sign of every rank, whether the run should stop, and, of a group that has
    lost a worker, the stacks of the ranks that answer."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.signs: dict[int, tuple[Sign, float]] = {}
        self.stopping = False
        self.told: dict[int, str] = {}

    def post(self, rows: list[Row]) -> bool:
        self.rows += rows
        return self.stopping

    def sign(self, sign: Sign) -> None:
        # By the clock of one machine: those of others may differ.
        self.signs[sign.rank] = sign, time.monotonic()

    def read(self, stop: bool) -> tuple[list[Row], Heard]:
        self.stopping |= stop
        rows, self.rows = self.rows, []
        return rows, self.heard()

    def heard(self) -> Heard:
        now = time.monotonic()
        return {rank: (sign, now - came) for rank, (sign, came) in self.signs.items()}

    def tell(self, stacks: dict[int, str]) -> None:
        self.told = stacks

    def stacks(self) -> dict[int, str]:
        return self.told


def new_board() -> Any:
    """A board on this machine, so that it lives as long as the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class Reporter:
    """The board as a worker sees it; never waits for it, so an answer comes a step or so later."""

    def __init__(self, board: Any, rank: int) -> None:
        self.board, self.rank, self.stopping, self.call = board, rank, False, None
        self.rows: list[Row] = []
        self.posted = 0.0

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def stop_requested(self, step: int) -> bool:
        """Whether this worker knows of a reason to stop after `step`: SIGTERM of its own, or on rank 0 the driver's request."""
        HERE.step = step
        if self.rank == 0:
            self._ask()
        return self.stopping or HERE.termed

    def _ask(self) -> None:
        if self.call is not None and ray.wait([self.call], timeout=0)[0]:
            self.stopping, self.call = ray.get(self.call), None
        if self.call is None and time.monotonic() - self.posted > POST_SECONDS:
            self.call, self.rows, self.posted = self.board.post.remote(self.rows), [], time.monotonic()

    def close(self) -> None:
        if self.rows:
            ray.get(self.board.post.remote(self.rows))
        HERE.end()
