"""What a run tells about itself: one flat row for every `log_every` steps, and one for every validation.

Fields of a row: `kind` ("train" or "validation"), `step` (steps done), `epoch` (a fraction), `samples` (seen so far), `loss`
and `loss_<part>` (mean squared errors, means over the interval); for "train" also `lr`, `grad_norm`, `samples_per_s`, `seconds`
(of the interval) and `checkpoint_wait` (seconds of it, not among the others, in which a checkpoint held up the training). All
but the last three are the same for an interrupted and an uninterrupted run. Where there was damage, rows of "train" count the
steps `skipped`, the `rollbacks` and the `damaged_groups` of rows so far, and rows of the kind "damage" say in `said` what was
done. The means are those of the steps that were not skipped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TIMINGS = ("samples_per_s", "seconds", "checkpoint_wait", "damaged_groups")


def history_text(rows: Iterable[Row]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_history(path: str | Path) -> list[Row]:
    """Read a file of `history_text`. Raises OSError when there is no such file."""
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
        self._since, self._timed_steps, self._waited = time.perf_counter(), 0, 0.0

    def step(self, steps_done: int, lr: float, values: dict[str, float], damage: Mapping[str, int]) -> Row | None:
        """Take in the values of a step, none of one that was skipped; gives the row when the interval is full.

        Args:
            damage: counts of what was damaged so far.
        """
        for name, value in values.items():
            self.pending[name] = self.pending.get(name, 0.0) + value
        self.pending_steps += bool(values)
        self._timed_steps += 1
        if steps_done % self.log_every or not self.pending_steps:
            return None
        means = {name: total / self.pending_steps for name, total in self.pending.items()}
        seconds = time.perf_counter() - self._since
        row = {
            **self._place("train", steps_done), **means, "lr": lr,
            "samples_per_s": round(self._timed_steps * self.global_batch / seconds, 2), "seconds": round(seconds, 3),
            "checkpoint_wait": round(self._waited, 3), **damage,
        }  # fmt: skip
        self.pending, self.pending_steps = {}, 0
        self._since, self._timed_steps, self._waited = time.perf_counter(), 0, 0.0
        self.rows.append(row)
        return row

    def validation(self, steps_done: int, values: dict[str, float]) -> Row:
        """Add a row of the losses on the held-out samples."""
        row = {**self._place("validation", steps_done), **values}
        self.rows.append(row)
        return row

    def damage(self, steps_done: int, said: str) -> Row:
        """Add a row that says what was done about damage."""
        row = {**self._place("damage", steps_done), "said": said}
        self.rows.append(row)
        return row

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave the time of a validation out of the speed."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Leave the time for which a checkpoint holds up the training out of the speed, and tell it."""
        started = time.perf_counter()
        with self.excluded():
            yield
        self._waited += time.perf_counter() - started

    def _place(self, kind: str, steps_done: int) -> Row:
        samples = steps_done * self.global_batch
        return {"kind": kind, "step": steps_done, "epoch": round(self.epochs(steps_done), 6), "samples": samples}
