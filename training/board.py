"""Between the workers of a training run and its driver: rows of the history go one way, the request to stop the other.

A signal handler in the workers could not do this: Ray Train runs the loop in a thread, perhaps on another machine.
"""

from __future__ import annotations

import time
from typing import Any

import ray

from training.history import Row

POST_SECONDS = 0.5


@ray.remote(num_cpus=0)
class Board:
    """Rows that the driver has not read yet, and whether the run should stop."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.stopping = False

    def post(self, rows: list[Row]) -> bool:
        self.rows += rows
        return self.stopping

    def read(self, stop: bool) -> list[Row]:
        self.stopping |= stop
        rows, self.rows = self.rows, []
        return rows


class Reporter:
    """The board as rank 0 sees it; never waits for it, so an answer comes a step or so later."""

    def __init__(self, board: Any) -> None:
        self.board, self.stopping, self.call = board, False, None
        self.rows: list[Row] = []
        self.posted = 0.0

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def stop_requested(self) -> bool:
        if self.call is not None and ray.wait([self.call], timeout=0)[0]:
            self.stopping, self.call = ray.get(self.call), None
        if self.call is None and time.monotonic() - self.posted > POST_SECONDS:
            self.call, self.rows, self.posted = self.board.post.remote(self.rows), [], time.monotonic()
        return self.stopping

    def close(self) -> None:
        if self.rows:
            ray.get(self.board.post.remote(self.rows))
