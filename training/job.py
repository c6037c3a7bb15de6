"""What a training run is given and what it gives back. Imports no torch, so that a driver can hold it cheaply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from training.begin import Kept
from training.config import TrainConfig
from training.history import Row
from training.told import Told

Source = str | Callable[[], str | None] | None


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the fix."""


class TrainingBug(TrainingError):
    """Training broke in a way that nobody foresaw; its cause holds the worker's traceback."""


@dataclass(frozen=True)
class TrainJob:
    """One run of a training stage; picklable, because workers on other machines get it.

    Attributes:
        config: what to train.
        shards: latent shards in their fixed order, paths or fsspec URLs that every worker can read.
        work_folder: local scratch folder; checkpoints are written below it and removed when published.
        publish: called in the worker of rank 0 as `publish(folder, step, metrics)` when a checkpoint is complete on its disk;
            `metrics` is the newest row of the history (see `training.history`). Training goes on when it returns.
        resume: checkpoint of this run to go on from: a folder, or a function that fetches the newest one and gives the
            folder, or None when there is none. It is called once on every machine.
        init_from: checkpoint of another run to begin from, in the same forms; the position table is interpolated when the grid
            has another size. Not read when resuming.
        keep: what to take of `init_from`, see `training.begin`.
        fork: what a person writes into the recipe to go on from the newest checkpoint with another value.
        subsets: name of the one that each shard is of; needed where `config.data.weights` gives subsets their shares.
        told: what the datasets tell of their shards; the rows of others are counted in the shards themselves.
        weights: native folder of weights that were trained elsewhere, to start from instead of `init_from`, in the same forms.
    """

    config: TrainConfig
    shards: tuple[str, ...]
    work_folder: str
    publish: Callable[[str, int, Row], None]
    resume: Source = None
    init_from: Source = None
    keep: tuple[Kept, ...] = ("weights", "ema")
    fork: str = "`from`"
    weights: Source = None
    subsets: tuple[str, ...] = ()
    told: tuple[Told, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done, the newest row of the history, and whether it was stopped before its last step."""

    step: int
    metrics: Row
    stopped: bool
