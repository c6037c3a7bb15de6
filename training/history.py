"""What a run tells about itself: one flat row for every `log_every` steps, and one for every validation.

Fields of a row: `kind` ("train" or "validation"), `step` (steps done), `epoch` (a fraction), `samples` (seen so far), `loss`
and `loss_<part>` (mean squared errors, means over the interval); for "train" also `lr`, `grad_norm`, `samples_per_s`, `seconds`
and `core_seconds` (of the interval, by the clock and of processor time of the first worker). All but the last three are the same
for an interrupted and an uninterrupted run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TIMINGS = ("samples_per_s", "seconds", "core_seconds")


def write_history(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_history(path: str | Path) -> list[Row]:
    """Read what `write_history` wrote. Raises OSError when there is no such file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


class Meter:
    """Adds up steps into rows. Its `pending` sums are part of a checkpoint, so that an interrupted interval goes on.

    Args:
        global_batch: samples a step.
        epochs: steps done -> epochs of the data that they have read.
        log_every: steps of an interval.
    """

    def __init__(self, global_batch: int, epochs: Callable[[int], float], log_every: int) -> None:
        self.global_batch, self.epochs, self.log_every = global_batch, epochs, log_every
        self.rows: list[Row] = []
        self.pending: dict[str, float] = {}
        self.pending_steps = 0
        self._timed_steps = 0
        self._since, self._cores_since = time.perf_counter(), time.process_time()

    def step(self, steps_done: int, lr: float, values: dict[str, float]) -> Row | None:
        """Take in the values of a step; gives the row when the interval is full."""
        for name, value in values.items():
            self.pending[name] = self.pending.get(name, 0.0) + value
        self.pending_steps += 1
        self._timed_steps += 1
        if steps_done % self.log_every:
            return None
        means = {name: total / self.pending_steps for name, total in self.pending.items()}
        now, cores = time.perf_counter(), time.process_time()
        seconds = now - self._since
        row = {
            **self._place("train", steps_done), **means, "lr": lr,
            "samples_per_s": round(self._timed_steps * self.global_batch / seconds, 2), "seconds": round(seconds, 3),
            "core_seconds": round(cores - self._cores_since, 3),
        }  # fmt: skip
        self.pending, self.pending_steps = {}, 0
        self._since, self._cores_since, self._timed_steps = now, cores, 0
        self.rows.append(row)
        return row

    def validation(self, steps_done: int, values: dict[str, float]) -> Row:
        """Add a row of the losses on the held-out samples."""
        row = {**self._place("validation", steps_done), **values}
        self.rows.append(row)
        return row

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave the time of a validation or a checkpoint out of the speed."""
        started, cores = time.perf_counter(), time.process_time()
        yield
        self._since += time.perf_counter() - started
        self._cores_since += time.process_time() - cores

    def _place(self, kind: str, steps_done: int) -> Row:
        samples = steps_done * self.global_batch
        return {"kind": kind, "step": steps_done, "epoch": round(self.epochs(steps_done), 6), "samples": samples}
