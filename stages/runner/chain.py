"""A chain: a result that grows step by step, such as a training, each unit of which is the whole of it at one step.

Its key says what grows: neither how far, nor at which steps something is kept. So what is there is found by listing the store,
and a run goes on from it whatever length and rhythm it was made with. `stages.runner.ledger` knows the other chains of a node.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.dataset import datasets_of
from stages.runner.contract import Job, Stage, UnitRecord

if TYPE_CHECKING:
    from stages.runner.graph import Planned
    from stages.runner.ledger import Entry, Ledger, Parent, Start


def unit_key(chain: str, step: int) -> str:
    """The key of the unit that a step of a chain is."""
    return f"{chain}-{step:08d}"


@dataclass(frozen=True)
class Chain:
    """The steps of one chain; pickled to the workers.

    `key` decides the keys of its units, `end` is the step that this run is to reach, `entry` what the ledger has of it.
    """

    job: Job
    key: str
    end: int
    entry: Entry | None = None

    @property
    def parent(self) -> Parent | None:
        """The step of another chain that this one began from."""
        return self.entry.parent if self.entry is not None else None

    @property
    def begins(self) -> int:
        """The step at which its count began."""
        return self.parent.begins if self.parent is not None else 0

    def key_of(self, step: int) -> str:
        return unit_key(self.key, step)

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
        """The greatest of these steps that a run to `end` can go on from; the one at which it begins when there is none."""
        return max((step for step in done if step <= self.end), default=self.begins)

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
        end: (config, the step that the chain begins from) -> the step that is asked for.
        begins: (stage, job, plan, the node's ledger) -> where a chain begins that is not in the ledger.
        keeps: (config, steps) -> those of these steps whose units stay when there are later ones.
        root: plan -> what its chain is begun from outside of the node, as of the ledger's entries.
    """

    run: Callable[[Chain], None]
    end: Callable[[Any, Parent | None], int]
    begins: Callable[[type[Stage], Job, Planned, Ledger], Start]
    keeps: Callable[[Any, Collection[int]], Collection[int]] = lambda config, steps: steps
    root: Callable[[Planned], str] = lambda planned: ""
