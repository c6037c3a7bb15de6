"""From latent shards to the micro-batches of a worker: clean data, timesteps and noise, each a pure function of the place.

Everything random about the sample at place g of the training (the latent drawn from its moments, the noise of each part) comes
from a Philox generator whose key is the seed and whose counter is g; `training.timesteps` draws a timestep for each modality
likewise. So it depends neither on the number of workers nor on the micro-batch nor on where the run was resumed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.begin import Growth
from training.config import TrainConfig
from training.latents import LatentReader, LatentSpec, Rows, Selection, ShardIndex
from training.order import Order
from training.timesteps import timesteps_at
from unidiffuser.modalities import Modality, all_parts, paper_modalities

TRAIN_STREAM, VALIDATION_STREAM = 2, 3
VALIDATION_LEVELS = 8
PREFETCHED_STEPS = 3


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass: clean parts and noise (B, *shape) fp32 by part, timesteps (B,) int64 by modality, and data
    types (B,) int64, which a model without the token for them does not read."""

    clean: dict[str, Tensor]
    noise: dict[str, Tensor]
    timesteps: dict[str, Tensor]
    data_type: Tensor

    def __len__(self) -> int:
        return len(next(iter(self.timesteps.values())))

    def to(self, device: torch.device) -> Batch:
        """The same samples on another device."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        return Batch(moved(self.clean), moved(self.noise), moved(self.timesteps), self.data_type.to(device, non_blocking=True))

    def split(self, size: int) -> list[Batch]:
        """Consecutive batches of `size` samples; the last one may be smaller."""
        columns = [{name: t.split(size) for name, t in part.items()} for part in (self.clean, self.noise, self.timesteps)]
        types = self.data_type.split(size)

        def piece(column: int, number: int) -> dict[str, Tensor]:
            return {name: pieces[number] for name, pieces in columns[column].items()}

        return [Batch(piece(0, i), piece(1, i), piece(2, i), kinds) for i, kinds in enumerate(types)]


def modalities_of(spec: LatentSpec, config: TrainConfig) -> tuple[Modality, Modality]:
    """The paper's modalities in the shapes of the shards, with the configuration's patch size and loss weights."""
    weights = config.objective.part_weights
    return paper_modalities(
        spec.latent, spec.clip[0], spec.text, config.model.patch, (weights.latent, weights.clip, weights.text)
    )


def sample_latent(moments: NDArray[np.float32], scaling_factor: float, generator: np.random.Generator) -> NDArray:
    """Draw z = (mean + std * noise) * scaling factor, (C, h, w), from moments (2C, h, w): mean, log-variance."""
    mean, logvar = np.split(moments, 2)
    std = np.exp(0.5 * np.clip(logvar, -30.0, 20.0))
    return (mean + std * generator.standard_normal(mean.shape, dtype=np.float32)) * np.float32(scaling_factor)


class Loader:
    """The batches of one worker.

    Args:
        config: the run.
        shards: latent shards in their fixed order; paths or fsspec URLs.
        rank, world: this worker takes the `rank`-th of `world` equal slices of every global batch.
        gather: see `LatentReader.index`.
        timesteps: N of the noise schedule; timesteps are drawn from 1 .. N.
        order_from: the step that reads place 0 of the order.
        growth: how many of the shards there were, by place; by default all of them from place 0 on.

    Raises:
        ShardError: a shard cannot be used.
        ValueError: no row is left.
    """

    def __init__(
        self,
        config: TrainConfig,
        shards: Sequence[str],
        rank: int = 0,
        world: int = 1,
        gather=None,
        timesteps: int = 1000,
        order_from: int = 0,
        growth: Sequence[Growth] = (),
    ) -> None:
        self.config, self.rank, self.world, self.timesteps = config, rank, world, timesteps
        self.order_from = order_from
        conditions, kind = config.data.conditions, config.data.data_type
        where = conditions[: len(config.data.where)]
        selection = Selection(where, config.validation.fraction, conditions[-1] if isinstance(kind, str) else kind)
        lanes_here = -(-config.lanes // world) + 1
        self.reader = LatentReader(shards, selection, cache=(lanes_here + 1) * config.data.shuffle_window)
        self.index: ShardIndex = self.reader.index(rank, world, gather)
        grown = [Growth(place, int(np.searchsorted(self.index.file, parts))) for place, parts in growth]
        self.order = Order(self.index.train, config.seed, config.data.shuffle_window, config.lanes, config.global_batch, grown)
        self.modalities = modalities_of(self.index.spec, config)

    @property
    def rows(self) -> int:
        """Training rows, over all workers: an epoch."""
        return self.order.rows

    def rows_of(self, shards: int) -> int:
        """Training rows of the first shards."""
        return int(self.index.train[self.index.file < shards].sum())

    def epochs(self, step: int) -> float:
        """Epochs that are read when `step` steps are done."""
        return self.order.epochs((step - self.order_from) * self.config.global_batch)

    def places(self, step: int) -> NDArray[np.int64]:
        """Places in the training that this worker computes in optimizer step `step` (from 0)."""
        size = self.config.global_batch // self.world
        start = (step - self.order_from) * self.config.global_batch + self.rank * size
        return np.arange(start, start + size, dtype=np.int64)

    def keys(self, step: int) -> list[str]:
        """Keys of the rows of a step, in order."""
        return [rows.keys[row] for rows, row in self._located(self.places(step))]

    def batch(self, step: int) -> Batch:
        """All samples of this worker in optimizer step `step` (from 0). Takes the same time for every step."""
        places = self.places(step)
        timesteps = timesteps_at(self.config.timesteps, self.config.seed, places, len(self.modalities), self.timesteps).tolist()
        samples = [
            self._sample(rows, row, (TRAIN_STREAM, int(place)), drawn)
            for place, drawn, (rows, row) in zip(places, timesteps, self._located(places), strict=True)
        ]
        return self._stacked(samples)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps `first` to `last` - 1, prepared in a thread a few steps ahead."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=PREFETCHED_STEPS)
        stopped = threading.Event()

        def offer(item: Batch | BaseException) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.2)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for step in range(first, last):
                    if stopped.is_set():
                        return
                    offer(self.batch(step))
            except BaseException as error:  # handed to the consumer, which raises it
                offer(error)

        thread = threading.Thread(target=produce, name="loader", daemon=True)
        thread.start()
        try:
            for _ in range(first, last):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def validation(self, samples: int | None = None) -> Batch | None:
        """This worker's share of the held-out samples, each at fixed timesteps with fixed noise; None when it has none.

        The first `samples` held-out rows (default: `validation.samples`) take the 8 x 8 pairs of evenly spread timesteps in turn,
        one pair a row.
        """
        wanted = samples or self.config.validation.samples
        ends = np.cumsum(self.index.held)
        total = min(wanted, int(ends[-1]) if len(ends) else 0)
        share = range(total * self.rank // self.world, total * (self.rank + 1) // self.world)
        groups = np.searchsorted(ends, np.array(share, dtype=np.int64), side="right")
        drawn = []
        for number, group in zip(share, groups, strict=True):
            _, held = self.reader.rows(int(self.index.file[group]), int(self.index.group[group]))
            row = number - int(ends[group] - self.index.held[group])
            levels = (number % VALIDATION_LEVELS, number // VALIDATION_LEVELS % VALIDATION_LEVELS)
            fixed = [max(1, round((level + 0.5) / VALIDATION_LEVELS * self.timesteps)) for level in levels]
            drawn.append(self._sample(held, row, (VALIDATION_STREAM, number), fixed))
        return self._stacked(drawn) if drawn else None

    def _located(self, places: NDArray[np.int64]) -> Iterator[tuple[Rows, int]]:
        groups, rows = self.order.locate(places)
        loaded = {
            group: self.reader.rows(int(self.index.file[group]), int(self.index.group[group]))[0] for group in np.unique(groups)
        }
        return ((loaded[group], int(row)) for group, row in zip(groups, rows, strict=True))

    def _sample(
        self, rows: Rows, row: int, place: tuple[int, int], levels: Sequence[int]
    ) -> tuple[dict[str, NDArray], dict[str, NDArray], dict[str, int], int]:
        """Clean parts, noise, timesteps (`levels`) and data type of one sample; the order of the draws is part of the result."""
        generator = np.random.Generator(np.random.Philox(key=[self.config.seed, 0], counter=[0, place[0], 0, place[1]]))
        timesteps = {modality.name: t for modality, t in zip(self.modalities, levels, strict=True)}
        latent = sample_latent(rows.parts["moments"][row].astype(np.float32), self.index.spec.scaling_factor, generator)
        clean = {"latent": latent, **{part: rows.parts[part][row].astype(np.float32) for part in ("clip", "text")}}
        noise = {part.name: generator.standard_normal(part.shape, dtype=np.float32) for part in all_parts(self.modalities)}
        return clean, noise, timesteps, int(rows.data_type[row])

    @staticmethod
    def _stacked(samples: list) -> Batch:
        # torch's own memory: it is aligned the same in every run, and the last bit of a matrix product depends on that.
        def stacked(columns: Sequence[dict[str, NDArray]]) -> dict[str, Tensor]:
            return {name: torch.stack([torch.from_numpy(column[name]) for column in columns]) for name in columns[0]}

        cleans, noises, timesteps, types = zip(*samples, strict=True)
        times = {name: torch.tensor([t[name] for t in timesteps]) for name in timesteps[0]}
        return Batch(stacked(cleans), stacked(noises), times, torch.tensor(types))
