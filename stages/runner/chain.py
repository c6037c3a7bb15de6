"""A chain: a result that grows step by step, such as a training, each unit of which is the whole of it at one step.

Its key says what grows: neither how far, nor at which steps something is kept. So what is there is found by listing the store,
and a run goes on from it whatever length and rhythm it was made with.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from infra.dataset import datasets_of
from stages.runner.contract import Job, UnitRecord


@dataclass(frozen=True)
class Chain:
    """The steps of one chain; pickled to the workers.

    `key` decides the keys of its units, `end` is the step that this run is to reach.
    """

    job: Job
    key: str
    end: int

    def key_of(self, step: int) -> str:
        return f"{self.key}-{step:08d}"

    def record(self, step: int) -> UnitRecord | None:
        return self.job.unit_done(self.key_of(step))

    def done(self) -> dict[int, UnitRecord]:
        """The records of all steps that are there, by step, ascending.

        Raises:
            StoreError: a record is damaged.
        """
        folder = posixpath.dirname(self.job.unit_folder(self.key))
        names = [name for name in self.job.store.list(folder) if name.startswith(f"{self.key}-")]
        found = {int(key.rsplit("-", 1)[1]): record for key, record in self.job.units_done(names).items()}
        return dict(sorted(found.items()))

    def start(self, done: Mapping[int, UnitRecord]) -> int:
        """The greatest of these steps that a run to `end` can go on from; 0 when there is none."""
        return max((step for step in done if step <= self.end), default=0)

    def remove(self, step: int) -> None:
        """Remove a step, unless it is a committed dataset, whose files must stay."""
        key = self.key_of(step)
        datasets = datasets_of(self.job.store, self.job.stage)
        if not any(entry.unit == key for dataset in datasets for entry in dataset.files):
            self.job.store.remove(self.job.unit_folder(key))


@dataclass(frozen=True)
class Gang:
    """How a chain is made, by workers that each hold a part of it.

    Attributes:
        run: grows the chain to its end, from `start`. It publishes a record under the key of every step that it keeps, and may
            stop early only by raising. The dataset is the unit at the end.
        end: config -> the step that it asks for.
        keeps: (config, step) -> whether the unit of a step stays when there is a later one.
    """

    run: Callable[[Chain], None]
    end: Callable[[Any], int]
    keeps: Callable[[Any, int], bool] = lambda config, step: True
