"""Which row is read at which place of the training: a pure function of (seed, place), the same for any number of workers.

An epoch is a permutation of the N training rows. Row groups, which are what a file system reads well, are permuted; inside a
window of K permuted groups the rows are permuted too (K is `shuffle_window` / L, so that L lanes mix as many). This gives a
sequence S of all rows. A global batch of B rows takes an equal part from each of L lanes, which are equal stretches of S, so
that a worker that serves L / W lanes reads only its share of the files and needs L / W windows in memory at a time:

    place o of the epoch  ->  batch k = o // B, lane l = o % B // b, j = o % b  with b = B / L
    S index               =   l * (N // B) * b + k * b + j        (the last N % B places: S index = o)

The default of L follows from the configuration alone, so that another number of workers changes nothing. A lane then has eight
rows of a batch or fewer, where eight divides the batch, and W workers fetch at most 1 + 8 W / B times what they use: less than
1.4 times from 20 rows a worker on, and once where each has whole lanes.

Epochs follow each other without a gap: place g of the training is place g % N of epoch g // N, and step s reads the places
s * B to (s + 1) * B - 1. So resuming at a step needs that step alone, and every row comes exactly once an epoch.

Rows that were written in the order in which they are to be read are not permuted: S is then the rows as they lie, in every
epoch. With one lane and none held out, place g reads row g % N. Where the rows follow a low-discrepancy sequence and the
timesteps another dimension of it, every stretch of steps so has close to its share of each kind of row at each timestep.

Data that grows while a training is at place g: the epoch that is under way ends first, over the rows that it began with, so
that every old row is read once in it. The next epoch, and all after it, are permutations of all rows, old and new.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.begin import Growth

Ints = NDArray[np.int64]


def _generator(seed: int, *place: int) -> np.random.Generator:
    """A counter-based generator: `seed` is its key, `place` the upper words of its counter."""
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, *place]))


class Epoch:
    """The sequence of one epoch.

    Args:
        counts: training rows in each row group, (G,); not all zero.
        seed: of the run.
        number: of the epoch, from 0.
        window: row groups whose rows are mixed.
        lanes: parallel stretches; divides `batch`.
        batch: rows of a global batch.
        shuffled: whether row groups, and the rows of a window, are permuted.
    """

    def __init__(self, counts: Ints, seed: int, number: int, window: int, lanes: int, batch: int, shuffled: bool = True) -> None:
        self.seed, self.number, self.window, self.lanes, self.batch = seed, number, window, lanes, batch
        self.shuffled = shuffled
        self.groups = _generator(seed, 0, number, 0).permutation(len(counts)) if shuffled else np.arange(len(counts))
        self.starts = np.concatenate([[0], np.cumsum(counts[self.groups])])
        self.rows = int(self.starts[-1])
        self.mixed = lru_cache(maxsize=2 * lanes + 2)(self._mixed)

    def _mixed(self, window: int) -> tuple[Ints, Ints]:
        """Group and row of each place of a window, both (rows of the window,)."""
        first, last = window * self.window, min((window + 1) * self.window, len(self.groups))
        start, end = self.starts[first], self.starts[last]
        places = np.arange(start, end)
        if self.shuffled:
            places = start + _generator(self.seed, 1, self.number, window).permutation(end - start)
        within = np.searchsorted(self.starts, places, side="right") - 1
        return self.groups[within], places - self.starts[within]

    def windows(self, places: Ints) -> tuple[Ints, Ints]:
        """Number of the window, and offset in it, both (n,), of places (n,) of this epoch, 0 .. rows - 1."""
        per_lane = self.batch // self.lanes
        whole = self.rows // self.batch * self.batch
        batch, within = np.divmod(places, self.batch)
        lane, offset = np.divmod(within, per_lane)
        striped = lane * (whole // self.lanes) + batch * per_lane + offset
        index = np.where(places < whole, striped, places)
        starts = self.starts[:: self.window]
        windows = np.searchsorted(starts, index, side="right") - 1
        return windows, index - starts[windows]

    def locate(self, places: Ints) -> tuple[Ints, Ints]:
        """Row group and training row in it, both (n,), at places (n,) of this epoch, 0 .. rows - 1."""
        windows, offsets = self.windows(places)
        groups, rows = np.empty_like(places), np.empty_like(places)
        for window in np.unique(windows):
            chosen = windows == window
            window_groups, window_rows = self.mixed(int(window))
            groups[chosen], rows[chosen] = window_groups[offsets[chosen]], window_rows[offsets[chosen]]
        return groups, rows


class _Stretch(NamedTuple):
    """Epochs over the same rows: the place and the number of the first one, and the rows of each."""

    start: int
    number: int
    groups: int
    rows: int


class Order:
    """The sequence of the whole training.

    Args:
        counts, seed, window, lanes, batch, shuffled: as of `Epoch`.
        growth: how many row groups there were, by place, ascending; by default all of them from place 0 on.

    Raises:
        ValueError: there is no row.
    """

    def __init__(
        self,
        counts: Ints,
        seed: int,
        window: int,
        lanes: int,
        batch: int,
        growth: Sequence[Growth] = (),
        shuffled: bool = True,
    ) -> None:
        self.rows = int(counts.sum())
        if self.rows == 0:
            raise ValueError("no row is left to train on: loosen data.where or give other shards")
        self.stretches: list[_Stretch] = []
        for place, groups in growth or [Growth(0, len(counts))]:
            start, number = self._next_epoch(place)
            if self.stretches and self.stretches[-1].start == start:
                # It has grown again before the first epoch over what came before.
                self.stretches.pop()
            self.stretches.append(_Stretch(start, number, groups, int(counts[:groups].sum())))
        self._made = lru_cache(maxsize=2)(
            lambda groups, number: Epoch(counts[:groups], seed, number, window, lanes, batch, shuffled)
        )

    def _next_epoch(self, place: int) -> tuple[int, int]:
        """Place and number of the first epoch that begins at a place or after it."""
        if not self.stretches:
            return 0, 0
        last = self.stretches[-1]
        ended = max(0, -(-(place - last.start) // last.rows))
        return last.start + ended * last.rows, last.number + ended

    def epochs(self, place: int) -> float:
        """How many epochs have been read when the training is at a place; the last one counts as a fraction."""
        stretch = next(s for s in reversed(self.stretches) if s.start <= place)
        return stretch.number + (place - stretch.start) / stretch.rows

    def _epoch(self, number: int) -> Epoch:
        stretch = next(s for s in reversed(self.stretches) if s.number <= number)
        return self._made(stretch.groups, number)

    def _by_epoch(self, places: Ints) -> Iterator[tuple[int, NDArray[np.bool_], Ints]]:
        """For each epoch that places (n,) are in: its number, which of them they are (n,), and their places in it."""
        which = np.searchsorted([s.start for s in self.stretches], places, side="right") - 1
        for at in np.unique(which):
            stretch = self.stretches[at]
            epochs, within = np.divmod(places - stretch.start, stretch.rows)
            for number in np.unique(epochs[which == at]):
                chosen = (which == at) & (epochs == number)
                yield stretch.number + int(number), chosen, within[chosen]

    def locate(self, places: Ints) -> tuple[Ints, Ints]:
        """Row group and training row in it, both (n,), at places (n,) of the training."""
        groups, rows = np.empty_like(places), np.empty_like(places)
        for number, chosen, within in self._by_epoch(places):
            groups[chosen], rows[chosen] = self._epoch(number).locate(within)
        return groups, rows

    def windows(self, places: Ints) -> tuple[Ints, Ints, Ints]:
        """Epoch, window and offset in the window, all (n,), of places (n,) of the training."""
        epochs, windows, offsets = (np.empty_like(places) for _ in range(3))
        for number, chosen, within in self._by_epoch(places):
            epochs[chosen] = number
            windows[chosen], offsets[chosen] = self._epoch(number).windows(within)
        return epochs, windows, offsets

    def window(self, epoch: int, window: int) -> tuple[Ints, Ints]:
        """Row group and training row in it of each offset of a window, both (rows of the window,)."""
        return self._epoch(epoch).mixed(window)
