"""From latent shards to the batches of a worker: clean data, timesteps and noise, each a pure function of the place.

Everything random about the sample at place g of the training (the latent drawn from its moments, the noise of each part) comes
from a counter-based generator, see `training.draws`, whose key is the seed and whose counters belong to g; `training.timesteps`
draws a timestep for each modality likewise. So it depends neither on the number of workers nor on the micro-batch nor on where
the run was resumed. A batch is made as a whole: nothing here is done for each sample in Python.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training import draws
from training.begin import Growth
from training.config import TrainConfig
from training.latents import LatentReader, LatentSpec, Parts, RowGroup, Selection, ShardIndex
from training.order import Order
from training.timesteps import timesteps_at
from training.windows import Windows, empty_parts
from unidiffuser.modalities import Modality, all_parts, paper_modalities

VALIDATION_LEVELS = 8
MAKERS = 2
STEPS_MADE_AHEAD, STEPS_READ_AHEAD = 2, 4
# Numbers that torch converts at once: from 2^15 on it would wake threads, which wait for those of the training step.
CONVERTED_AT_ONCE = 2**15 - 64
# Numbers of latents that are drawn at once: they and what is made of them stay in a core's cache.
DRAWN_AT_ONCE = 2**15


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
        spec.latent, spec.clip[0] if spec.clip else None, spec.text, config.model.patch,
        (weights.latent, weights.clip, weights.text),
    )  # fmt: skip


def to_fp32(half: NDArray[np.float16]) -> Tensor:
    """The same numbers as a tensor of fp32; torch's conversion takes a twentieth of numpy's time."""
    # torch's own memory: it is aligned the same in every run, and the last bit of a matrix product depends on that.
    out = torch.empty(half.shape)
    source, target = torch.from_numpy(half).view(-1), out.view(-1)
    for start in range(0, len(source), CONVERTED_AT_ONCE):
        target[start : start + CONVERTED_AT_ONCE].copy_(source[start : start + CONVERTED_AT_ONCE])
    return out


def draw_latents(z: NDArray[np.float32], moments: NDArray[np.float16], scaling_factor: float) -> None:
    """Turn normal numbers (n, C h w) into (mean + std * number) * scaling factor; moments (n, 2C, h, w): mean, log-variance."""
    width = z.shape[1]
    rows = max(1, DRAWN_AT_ONCE // width)
    for start in range(0, len(z), rows):
        piece = z[start : start + rows]
        told = to_fp32(moments[start : start + rows]).numpy().reshape(len(piece), 2 * width)
        std = np.minimum(told[:, width:], np.float32(20.0))
        np.maximum(std, np.float32(-30.0), out=std)
        std *= np.float32(0.5)
        np.exp(std, out=std)
        piece *= std
        piece += told[:, :width]
        piece *= np.float32(scaling_factor)


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
        self.reader = LatentReader(shards, selection)
        self.index: ShardIndex = self.reader.index(rank, world, gather)
        grown = [Growth(place, int(np.searchsorted(self.index.file, parts))) for place, parts in growth]
        window = max(1, config.data.shuffle_window // config.lanes)
        self.order = Order(
            self.index.train, config.seed, window, config.lanes, config.global_batch, grown, config.data.order == "shuffled"
        )
        self.modalities = modalities_of(self.index.spec, config)
        self._starts = lru_cache(STEPS_MADE_AHEAD + STEPS_READ_AHEAD)(self._window_starts)

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
        groups, rows = self.order.locate(self.places(step))
        read = {group: self._read(int(group)) for group in np.unique(groups)}
        return [read[group].keys[read[group].train[row]] for group, row in zip(groups, rows, strict=True)]

    def batch(self, step: int) -> Batch:
        """All samples of this worker in optimizer step `step` (from 0). Takes the same time for every step."""
        windows = Windows(self._read, self.order, self.index.spec)
        windows.hold(self._starts(step))
        return self._batch(step, windows)

    def _batch(self, step: int, windows: Windows) -> Batch:
        places = self.places(step)
        timesteps = timesteps_at(self.config.timesteps, self.config.seed, places, len(self.modalities), self.timesteps)
        return self._made(draws.TRAIN, places, windows.gather(places), timesteps)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps `first` to `last` - 1, made by threads some steps ahead."""
        windows = Windows(self._read, self.order, self.index.spec)
        threads = ThreadPoolExecutor(MAKERS, thread_name_prefix="batches")
        made: deque[Future[Batch]] = deque()
        try:
            for step in range(first, last + STEPS_MADE_AHEAD):
                if step < last:
                    # The steps that are being made, and those to be read ahead of them.
                    steps = range(max(first, step - STEPS_MADE_AHEAD), min(step + STEPS_READ_AHEAD, last))
                    windows.hold(self._all_starts(steps))
                    made.append(threads.submit(self._batch, step, windows))
                if step >= first + STEPS_MADE_AHEAD:
                    yield made.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)
            windows.hold({})

    def validation(self, samples: int | None = None) -> Batch | None:
        """This worker's share of the held-out samples, each at fixed timesteps with fixed noise; None when it has none.

        The first `samples` held-out rows (default: `validation.samples`) take the 8 x 8 pairs of evenly spread timesteps in turn,
        one pair a row.
        """
        wanted = samples or self.config.validation.samples
        ends = np.cumsum(self.index.held)
        total = min(wanted, int(ends[-1]) if len(ends) else 0)
        numbers = np.arange(total * self.rank // self.world, total * (self.rank + 1) // self.world, dtype=np.int64)
        if not len(numbers):
            return None
        groups = np.searchsorted(ends, numbers, side="right")

        rows = empty_parts(self.index.spec, len(numbers))
        for group in np.unique(groups):
            at, read = np.flatnonzero(groups == group), self._read(int(group))
            chosen = read.held[numbers[at] - (ends[group] - self.index.held[group])]
            for part, values in rows.items():
                values[at] = read.parts[part][chosen]
        levels = np.stack([numbers % VALIDATION_LEVELS, numbers // VALIDATION_LEVELS % VALIDATION_LEVELS], axis=1)
        fixed = np.maximum(1, np.rint((levels + 0.5) / VALIDATION_LEVELS * self.timesteps)).astype(np.int64)
        return self._made(draws.VALIDATION, numbers, rows, fixed)

    def _read(self, group: int) -> RowGroup:
        return self.reader.read(int(self.index.file[group]), int(self.index.group[group]))

    def _window_starts(self, step: int) -> dict[tuple[int, int], int]:
        """The windows of this worker's part of a step, and the first offset in each."""
        starts: dict[tuple[int, int], int] = {}
        epochs, windows, offsets = self.order.windows(self.places(step))
        for epoch, window, offset in zip(epochs.tolist(), windows.tolist(), offsets.tolist(), strict=True):
            starts[epoch, window] = min(offset, starts.get((epoch, window), offset))
        return starts

    def _all_starts(self, steps: Iterable[int]) -> dict[tuple[int, int], int]:
        starts: dict[tuple[int, int], int] = {}
        for step in steps:
            for key, first in self._starts(step).items():
                starts[key] = min(first, starts.get(key, first))
        return starts

    def _made(self, stream: int, places: NDArray[np.int64], rows: Parts, timesteps: NDArray[np.int64]) -> Batch:
        """The batch of rows (n, ...) at places that follow each other, (n,), with timesteps (n, modalities)."""
        count, spec = len(places), self.index.spec
        latent = torch.empty(count, *spec.latent)
        noise = {part.name: torch.empty(count, *part.shape) for part in all_parts(self.modalities)}
        z, *others = (tensor.numpy().reshape(count, -1) for tensor in (latent, *noise.values()))
        draws.fill_normal(self.config.seed, stream, int(places[0]), [z, *others])
        draw_latents(z, rows["moments"], spec.scaling_factor)
        clean = {"latent": latent} | {part: to_fp32(rows[part]) for part in noise if part != "latent"}
        columns = (torch.from_numpy(np.ascontiguousarray(column)) for column in timesteps.T)
        times = dict(zip((modality.name for modality in self.modalities), columns, strict=True))
        return Batch(clean, noise, times, torch.from_numpy(rows["data_type"]))
