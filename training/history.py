"""What a run tells about itself: one flat row for every `log_every` steps, and one for every validation.

Fields of a row: `kind` ("train", "validation" or "damage"), `step` (steps done), `epoch` (a fraction), `samples` (seen so far),
and means over the interval, of the steps that were not skipped, or over the held-out rows:

    loss                   the objective
    loss_PART              mean squared error of a part, or of a modality: that of its parts, each by its weight
    loss_MODALITY_t1 ..    the same of the samples whose timestep is in an eighth of all, from nearly clean to nearly noise, where
                           there were any
    loss_data.SUBSET       the objective on the samples of a subset, where subsets have weights
    ema_...                of a validation, the same with the moving average of the weights

Where subsets have weights, `epoch_data.SUBSET` is the epoch of each, and `epoch` the least of them.

A row of kind "train" has also `lr`, `grad_norm`, and what is measured, on rank 0: `samples_per_s`, `tokens_per_s`, `mfu` (see
`training.speed`), `memory` in GiB, the `core_seconds` of processor time, and the `seconds` of the interval, of which `data_wait`
are spent waiting for the loader. Validations and what checkpoints hold up are not in these; `checkpoint_wait` is the latter,
since the row before. What is not measured is the same for an interrupted and an uninterrupted run.

Where there was damage, rows count the steps `skipped` and the `rollbacks` so far, those of kind "train" also the
`damaged_groups` of rows, and rows of kind "damage" say in `said` what was done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

Row = dict[str, Any]
Wait = Literal["data", "checkpoint"]
WAITS: tuple[Wait, ...] = ("data", "checkpoint")

T = TypeVar("T")


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
        epochs: steps done -> epochs of the data that they have read, by the names that a row has for them.
        log_every: steps of an interval.
        gauges: samples a second -> what else is measured when a row is made.
    """

    def __init__(
        self,
        global_batch: int,
        epochs: Callable[[int], Mapping[str, float]],
        log_every: int,
        gauges: Callable[[float], Mapping[str, float]] = lambda samples_per_s: {},
    ) -> None:
        self.global_batch, self.epochs, self.log_every, self.gauges = global_batch, epochs, log_every, gauges
        self.rows: list[Row] = []
        # By name, a sum and how many it is the sum of.
        self.pending: dict[str, tuple[float, float]] = {}
        self.begin()

    def begin(self) -> None:
        """The interval's time counts from here."""
        self._since, self._cores_since, self._timed_steps = time.perf_counter(), time.process_time(), 0
        self._waited: dict[Wait, float] = dict.fromkeys(WAITS, 0.0)

    def step(
        self,
        steps_done: int,
        lr: float,
        values: Mapping[str, float],
        sums: Mapping[str, tuple[float, float]] | None = None,
        damage: Mapping[str, int] | None = None,
    ) -> Row | None:
        """Take in the values of a step, none of one that was skipped; gives the row when the interval is full.

        Args:
            sums: with how many each is the sum of.
            damage: counts of what was damaged so far.
        """
        for name, (value, count) in {**{name: (value, 1) for name, value in values.items()}, **(sums or {})}.items():
            total, counted = self.pending.get(name, (0.0, 0.0))
            self.pending[name] = (total + value, counted + count)
        self._timed_steps += 1
        if steps_done % self.log_every or not self.pending:
            return None
        seconds = time.perf_counter() - self._since
        speed = self._timed_steps * self.global_batch / seconds
        row = {
            **self._place("train", steps_done), **means(self.pending), "lr": lr, "samples_per_s": round(speed, 2),
            **self.gauges(speed), **{f"{kind}_wait": round(waited, 3) for kind, waited in self._waited.items()},
            "seconds": round(seconds, 3), "core_seconds": round(time.process_time() - self._cores_since, 3), **(damage or {}),
        }  # fmt: skip
        self.pending = {}
        self.begin()
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
        """Leave the time of a validation or a checkpoint out of the speed; one inside another counts once."""
        started, since = time.perf_counter(), self._since
        cores, cores_since = time.process_time(), self._cores_since
        yield
        self._since = since + time.perf_counter() - started
        self._cores_since = cores_since + time.process_time() - cores

    @contextmanager
    def waiting(self, kind: Wait) -> Iterator[None]:
        """Count the time as waited for the loader or for a checkpoint; the latter is left out of the speed."""
        started = time.perf_counter()
        with self.excluded() if kind == "checkpoint" else nullcontext():
            yield
        self._waited[kind] += time.perf_counter() - started

    def waited(self, items: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each is there counts as waited for data."""
        iterator = iter(items)
        while True:
            with self.waiting("data"):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def _place(self, kind: str, steps_done: int) -> Row:
        samples = steps_done * self.global_batch
        epochs = {name: round(epoch, 6) for name, epoch in self.epochs(steps_done).items()}
        return {"kind": kind, "step": steps_done, **epochs, "samples": samples}


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Sums over their counts, without those of nothing."""
    return {name: total / count for name, (total, count) in sums.items() if count}
