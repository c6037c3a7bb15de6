"""From latent shards to the batches of a worker: clean data, timesteps and noise, each a pure function of the place.

Everything random about the sample at place g of the training (the latent drawn from its moments, the noise of each part) comes
from a counter-based generator, see `training.draws`, whose key is the seed and whose counters belong to g; `training.timesteps`
draws a timestep for each modality likewise, and `training.captions` which caption of the row. So it depends neither on the number
of workers nor on the micro-batch nor on where the run was resumed. A batch is made as a whole: nothing here is done for each
sample in Python.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training import draws
from training.begin import Growth
from training.captions import texts
from training.config import TrainConfig
from training.held import spread
from training.index import Gather, ShardIndex, index_of
from training.latents import LatentReader, LatentSpec, Parts, RowGroup, Selection, ShardError
from training.mixture import Mixture, Windowed, growth_of
from training.order import Order
from training.threads import beside
from training.timesteps import timesteps_at
from training.told import Told
from training.windows import LOCAL_READERS, READERS, Windows, empty_parts
from unidiffuser.modalities import Modality, all_parts, paper_modalities

log = logging.getLogger(__name__)

VALIDATION_LEVELS = 8
MAKERS = 2
STEPS_MADE_AHEAD, STEPS_READ_AHEAD = 2, 4
# Numbers that torch converts at once: from 2^15 on it would wake threads, which wait for those of the training step.
CONVERTED_AT_ONCE = 2**15 - 64
# Numbers of latents that are drawn at once: they and what is made of them stay in a core's cache.
DRAWN_AT_ONCE = 2**15


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass: clean parts and noise (B, *shape) fp32 by part, timesteps (B,) int64 by modality, data types
    (B,) int64, which a model without the token for them does not read, and numbers of the subsets (B,) int64."""

    clean: dict[str, Tensor]
    noise: dict[str, Tensor]
    timesteps: dict[str, Tensor]
    data_type: Tensor
    subset: Tensor

    def __len__(self) -> int:
        return len(next(iter(self.timesteps.values())))

    def to(self, device: torch.device) -> Batch:
        """The same samples on another device."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        numbers = (tensor.to(device, non_blocking=True) for tensor in (self.data_type, self.subset))
        return Batch(moved(self.clean), moved(self.noise), moved(self.timesteps), *numbers)

    def split(self, size: int) -> list[Batch]:
        """Consecutive batches of `size` samples; the last one may be smaller."""
        columns = [{name: t.split(size) for name, t in part.items()} for part in (self.clean, self.noise, self.timesteps)]
        numbers = zip(self.data_type.split(size), self.subset.split(size), strict=True)

        def piece(column: int, number: int) -> dict[str, Tensor]:
            return {name: pieces[number] for name, pieces in columns[column].items()}

        return [Batch(piece(0, i), piece(1, i), piece(2, i), *own) for i, own in enumerate(numbers)]


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


def too_many_damaged(config: TrainConfig, found: int, what: object) -> ShardError:
    """The error of more damaged row groups than the configuration allows."""
    allowed = config.damage.skip_damaged
    return ShardError(f"{found} row groups are damaged, and damage.skip_damaged allows {allowed}: {what}")


class Loader:
    """The batches of one worker.

    Args:
        config: the run.
        shards: latent shards in their fixed order; paths or fsspec URLs.
        subsets: name of the one that each shard is of; by default they are all of one. `data.weights` gives them their shares,
            and a validation looks at as many rows of each.
        told: what datasets tell of the shards.
        rank, world: this worker takes the `rank`-th of `world` equal slices of every global batch.
        gather: see `training.index`.
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
        gather: Gather | None = None,
        timesteps: int = 1000,
        order_from: int = 0,
        growth: Sequence[Growth] = (),
        subsets: Sequence[str] = (),
        told: Sequence[Told] = (),
    ) -> None:
        _, self.inputs = np.unique(np.array(subsets or [""] * len(shards)), return_inverse=True)
        self.config, self.rank, self.world, self.timesteps = config, rank, world, timesteps
        self.order_from = order_from
        # By number, what is wrong with each row group that this worker met.
        self.damaged: dict[int, str] = {}
        conditions, kind = config.data.conditions, config.data.data_type
        where = conditions[: len(config.data.where)]
        selection = Selection(where, config.validation.fraction, conditions[-1] if isinstance(kind, str) else kind)
        self.reader = LatentReader(shards, selection, sorted(config.data.captions))
        self.index: ShardIndex = index_of(self.reader, told, rank, world, gather)
        grown = [Growth(place, int(np.searchsorted(self.index.file, parts))) for place, parts in growth]
        self.subsets = sorted(config.data.weights or ())
        of_shard = [self.subsets.index(name) for name in subsets] if self.subsets else [0] * len(shards)
        self.subset_of_group = np.array(of_shard, np.int64)[self.index.file]
        self.order = self._mixture(grown)
        self.modalities = modalities_of(self.index.spec, config)
        self._starts = lru_cache(STEPS_MADE_AHEAD + STEPS_READ_AHEAD)(self._window_starts)

    @property
    def rows(self) -> int:
        """Training rows, over all workers: an epoch."""
        return self.order.rows

    def rows_of(self, shards: int) -> int:
        """Training rows of the first shards."""
        return int(self.index.train[self.index.file < shards].sum())

    def epochs(self, step: int) -> dict[str, float]:
        """Epochs that are read when `step` steps are done, by the names of `training.history`."""
        found = self.order.epochs((step - self.order_from) * self.config.global_batch)
        return {"epoch": min(found), **{f"epoch_data.{name}": epochs for name, epochs in zip(self.subsets, found, strict=False)}}

    def _mixture(self, growth: Sequence[Growth]) -> Mixture:
        """The order of the training: of each subset its own, over its own row groups."""
        config, train = self.config, self.index.train
        orders, groups = [], []
        for number, (weight, batch) in enumerate(zip(config.shares, config.batches, strict=True)):
            chosen = self.subset_of_group == number
            if self.subsets and not train[chosen].any():
                raise ValueError(f"no row of {self.subsets[number]} is left to train on: loosen data.where or give other shards")
            grown = growth_of(growth, chosen, (weight, sum(config.shares)))
            orders.append(
                Order(train[chosen], config.seed, *config.lanes_of(batch), batch, grown, config.data.order == "shuffled")
            )
            groups.append(np.flatnonzero(chosen))
        return Mixture(orders, groups, config.shares)

    def places(self, step: int) -> NDArray[np.int64]:
        """Places in the training that this worker computes in optimizer step `step` (from 0)."""
        size = self.config.global_batch // self.world
        start = (step - self.order_from) * self.config.global_batch + self.rank * size
        return np.arange(start, start + size, dtype=np.int64)

    def keys(self, step: int) -> list[str]:
        """Keys of the rows of a step, in order."""
        groups, rows = self.order.locate(self.places(step))
        read = {group: self._read(int(group)) for group in np.unique(groups)}
        return [read[group].keys[int(read[group].train[row])].as_py() for group, row in zip(groups, rows, strict=True)]

    def batch(self, step: int) -> Batch:
        """All samples of this worker in optimizer step `step` (from 0). Takes the same time for every step."""
        windows = self._windows()
        windows.hold(self._starts(step))
        return self._batch(step, windows)

    def _windows(self) -> Windows:
        return Windows(self._read, self.order, self.index.spec, LOCAL_READERS if self.reader.local else READERS)

    def _batch(self, step: int, windows: Windows) -> Batch:
        places = self.places(step)
        timesteps = timesteps_at(self.config.timesteps, self.config.seed, places, len(self.modalities), self.timesteps)
        subsets, _ = self.order.split(places)
        return self._made(draws.TRAIN, places, windows.gather(places), timesteps, subsets)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps `first` to `last` - 1, made by threads some steps ahead."""
        windows = self._windows()
        threads = beside(MAKERS, "batches")
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

        `samples` held-out rows (default: `validation.samples`), see `training.held`, take the 8 x 8 pairs of evenly spread
        timesteps in turn, one pair a row.
        """
        wanted = samples or self.config.validation.samples
        chosen_rows = spread(self.index.held, self.index.file, self.inputs, wanted)
        total, ends = len(chosen_rows), np.cumsum(self.index.held)
        numbers = np.arange(total * self.rank // self.world, total * (self.rank + 1) // self.world, dtype=np.int64)
        if not len(numbers):
            return None
        held = chosen_rows[numbers]
        groups = np.searchsorted(ends, held, side="right")

        rows = empty_parts(self.index.spec, len(numbers))
        for group in np.unique(groups):
            at, read = np.flatnonzero(groups == group), self._read(int(group))
            chosen = read.held[held[at] - (ends[group] - self.index.held[group])]
            for part, values in rows.items():
                values[at] = read.parts[part][chosen]
        levels = np.stack([numbers % VALIDATION_LEVELS, numbers // VALIDATION_LEVELS % VALIDATION_LEVELS], axis=1)
        fixed = np.maximum(1, np.rint((levels + 0.5) / VALIDATION_LEVELS * self.timesteps)).astype(np.int64)
        return self._made(draws.VALIDATION, numbers, rows, fixed, self.subset_of_group[groups])

    def _read(self, group: int) -> RowGroup:
        """A row group; in place of one that is damaged, rows of the next ones, as far as the configuration allows that."""
        read = self._whole(group)
        return self._instead(group) if read is None else read

    def _whole(self, group: int) -> RowGroup | None:
        """A row group; None where it is damaged, which is counted."""
        index = self.index
        rows = int(index.train[group]), int(index.held[group])
        try:
            return self.reader.read(int(index.file[group]), int(index.group[group]), rows)
        except ShardError as error:
            if self.config.damage.skip_damaged == 0:
                raise
            if group not in self.damaged:
                log.warning("%s", error)
                self.damaged[group] = str(error)
            if len(self.damaged) > self.config.damage.skip_damaged:
                raise too_many_damaged(self.config, len(self.damaged), error) from error
            return None

    def _instead(self, group: int) -> RowGroup:
        """As many rows for training and as many held-out ones as a damaged row group has, of the next one of its subset."""
        groups, kinds = len(self.index.train), (self.index.train, self.index.held)
        wanted = int(self.index.train[group]), int(self.index.held[group])
        for other in ((group + step) % groups for step in range(1, groups)):
            if self.subset_of_group[other] != self.subset_of_group[group]:
                continue
            has = all(counts[other] > 0 or not rows for counts, rows in zip(kinds, wanted, strict=True))
            if has and (read := self._whole(other)) is not None:
                train, held = (np.resize(rows, count) for rows, count in zip((read.train, read.held), wanted, strict=True))
                return RowGroup(read.keys, read.parts, train, held)
        raise ShardError(f"{self.reader.shards[int(self.index.file[group])]}: no row group is left in place of a damaged one")

    def _window_starts(self, step: int) -> dict[Windowed, int]:
        """The windows of this worker's part of a step, and the first offset in each."""
        codes, offsets = self.order.windows(self.places(step))
        return {Windowed.of(code): int(offsets[codes == code].min()) for code in np.unique(codes).tolist()}

    def _all_starts(self, steps: Iterable[int]) -> dict[Windowed, int]:
        starts: dict[Windowed, int] = {}
        for step in steps:
            for key, first in self._starts(step).items():
                starts[key] = min(first, starts.get(key, first))
        return starts

    def _made(
        self, stream: int, places: NDArray[np.int64], rows: Parts, timesteps: NDArray[np.int64], subsets: NDArray[np.int64]
    ) -> Batch:
        """The batch of rows (n, ...) at places that follow each other, (n,), with timesteps (n, modalities) and subsets (n,)."""
        count, spec = len(places), self.index.spec
        latent = torch.empty(count, *spec.latent)
        noise = {part.name: torch.empty(count, *part.shape) for part in all_parts(self.modalities)}
        z, *others = (tensor.numpy().reshape(count, -1) for tensor in (latent, *noise.values()))
        draws.fill_normal(self.config.seed, stream, int(places[0]), [z, *others])
        draw_latents(z, rows["moments"], spec.scaling_factor)
        rows = rows | {"text": texts(self.config.data.captions, self.config.seed, stream, places, rows)}
        clean = {"latent": latent} | {part: to_fp32(rows[part]) for part in noise if part != "latent"}
        columns = (torch.from_numpy(np.ascontiguousarray(column)) for column in timesteps.T)
        times = dict(zip((modality.name for modality in self.modalities), columns, strict=True))
        return Batch(clean, noise, times, torch.from_numpy(rows["data_type"]), torch.from_numpy(subsets))
