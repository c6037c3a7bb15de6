"""What a training run is given and what it gives back. Imports no torch, so that a driver can hold it cheaply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from training.begin import Kept
from training.config import TrainConfig
from training.history import Row
from training.told import Told

Source = str | Callable[[], str | None] | None


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the fix."""


class TrainingBug(TrainingError):
    """Training broke in a way that nobody foresaw; its cause holds the worker's traceback."""


class Writing(Protocol):
    """A file while it is written; `size` counts its bytes so far."""

    size: int

    @property
    def sha256(self) -> str: ...

    def write(self, data: bytes | memoryview) -> None: ...


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint as it was written; `name` has no folder."""

    name: str
    bytes: int
    sha256: str


class Keeper(Protocol):
    """Where the checkpoints of a run are kept; every worker has a copy of it, and calls it in a thread."""

    def writing(self, step: int, name: str) -> AbstractContextManager[Writing]:
        """Write a file of the checkpoint of a step, whose files count once they are committed."""

    def commit(self, step: int, files: Sequence[Written], rows: int, metrics: Row) -> None:
        """Make the checkpoint of a step count, by a worker alone.

        Args:
            files: of all workers.
            rows: that the training reads.
            metrics: newest row of the history (see `training.history`).
        """

    def steps(self) -> list[int]:
        """The steps whose checkpoints count, ascending."""

    def fetch(self, step: int, folder: str) -> str:
        """A folder with the files of a checkpoint, on this machine: `folder` or one that is there already."""

    def set_aside(self, step: int) -> None:
        """Let a checkpoint count no longer; its files stay for whoever wants to look at them."""


@dataclass(frozen=True)
class TrainJob:
    """One run of a training stage; picklable, because workers on other machines get it.

    Attributes:
        config: what to train.
        shards: latent shards in their fixed order, paths or fsspec URLs that every worker can read.
        traced: called in the worker of rank 0 with the file that `profile` makes; with None there is none.
        work_folder: local scratch folder.
        publish: where checkpoints go.
        resume: checkpoint of this run to go on from: a folder, or a function that fetches the newest one that is whole and gives
            the folder, or None when there is none. It is called once on every machine, and what it has fetched is removed when
            it is read.
        newest: the step of the newest checkpoint of this run, whole or not.
        init_from: checkpoint of another run to begin from, in the same forms; the position table is interpolated when the grid
            has another size. Read when resuming only to go back to it.
        keep: what to take of `init_from`, see `training.begin`.
        fork: what a person writes into the recipe to go on from the newest checkpoint with another value.
        subsets: name of the one that each shard is of, or none where they are all of one; `config.data.weights` needs them.
        told: what the datasets tell of their shards; the rows of others are counted in the shards themselves.
        weights: native folder of weights that were trained elsewhere, to start from instead of `init_from`, in the same forms.
    """

    config: TrainConfig
    shards: tuple[str, ...]
    work_folder: str
    publish: Keeper
    resume: Source = None
    newest: int | None = None
    init_from: Source = None
    keep: tuple[Kept, ...] = ("weights", "ema")
    fork: str = "`from`"
    weights: Source = None
    traced: Callable[[str], None] | None = None
    subsets: tuple[str, ...] = ()
    told: tuple[Told, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done, and whether it was stopped before its last step."""

    step: int
    stopped: bool
