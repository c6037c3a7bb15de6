"""Which subset is read at which place of the training, where subsets have weights, and which row of it.

Weights are whole numbers w_i, and S is their sum, without a common divisor. Every S places in a row hold w_i places of subset i,
always in the same pattern: the j-th of them lies at j S / w_i or after it, and before (j + 1) S / w_i, both rounded outwards.
So any stretch of places from the first one on holds each subset's share of it to within one sample. S divides the global batch,
so each global batch holds exactly its share, B_i = B w_i / S.

    place g of the training  ->  pattern p = g % S, subset i = pattern[p]
    place in the subset      =   g // S * w_i + the places of i before p in the pattern

Each subset has an order of its own (`training.order`) with a batch of B_i, so it has epochs of its own, and grows by that rule.
Without weights there is one subset, whose places are those of the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.begin import Growth
from training.order import Ints, Order

# There are fewer subsets of a training, and windows of an epoch.
SUBSETS, WINDOWS = 2**10, 2**32


def pattern_of(weights: Sequence[int]) -> list[int]:
    """The subsets of sum(weights) places in a row; whichever must come first comes first."""
    total, done = sum(weights), [0] * len(weights)
    pattern: list[int] = []
    for place in range(total):
        ready = [i for i, weight in enumerate(weights) if done[i] < weight and done[i] * total // weight <= place]
        chosen = min(ready, key=lambda i: -(-(done[i] + 1) * total // weights[i]))
        done[chosen] += 1
        pattern.append(chosen)
    return pattern


def reduced(weights: Sequence[int]) -> tuple[int, ...]:
    """The same shares in the least whole numbers."""
    return tuple(weight // gcd(*weights) for weight in weights)


class Windowed(NamedTuple):
    """A window: subset, epoch of the subset, and number in the epoch."""

    subset: int
    epoch: int
    window: int

    @classmethod
    def of(cls, code: int) -> Windowed:
        """From one number, in which `Mixture.windows` has the three."""
        rest, window = divmod(code, WINDOWS)
        epoch, subset = divmod(rest, SUBSETS)
        return cls(subset, epoch, window)


class Mixture:
    """The sequence of the whole training.

    Args:
        orders: of each subset.
        groups: number of each row group of a subset's order among those of all shards.
        weights: of each subset.
    """

    def __init__(self, orders: Sequence[Order], groups: Sequence[Ints], weights: Sequence[int] = (1,)) -> None:
        self.orders, self._groups = list(orders), [np.asarray(numbers, np.int64) for numbers in groups]
        self._weights = np.array(reduced(weights), np.int64)
        self._pattern = np.array(pattern_of(self._weights.tolist()), np.int64)
        before = np.zeros(len(self._pattern), np.int64)
        for subset in range(len(orders)):
            here = self._pattern == subset
            before[here] = np.arange(here.sum())
        self._before = before

    @property
    def rows(self) -> int:
        """Training rows of all subsets."""
        return sum(order.rows for order in self.orders)

    def split(self, places: Ints) -> tuple[Ints, Ints]:
        """Subset, and place in it, both (n,), of places (n,) of the training."""
        rounds, within = np.divmod(places, len(self._pattern))
        subsets = self._pattern[within]
        return subsets, rounds * self._weights[subsets] + self._before[within]

    def epochs(self, place: int) -> list[float]:
        """How many epochs of each subset have been read at a place; the last one counts as a fraction."""
        rounds, within = divmod(place, len(self._pattern))
        done = rounds * self._weights + np.bincount(self._pattern[:within], minlength=len(self.orders))
        return [order.epochs(int(count)) for order, count in zip(self.orders, done, strict=True)]

    def locate(self, places: Ints) -> tuple[Ints, Ints]:
        """Row group and training row in it, both (n,), at places (n,) of the training."""
        subsets, within = self.split(places)
        groups, rows = np.empty_like(places), np.empty_like(places)
        for subset in np.unique(subsets):
            chosen = subsets == subset
            numbers, rows[chosen] = self.orders[subset].locate(within[chosen])
            groups[chosen] = self._groups[subset][numbers]
        return groups, rows

    def windows(self, places: Ints) -> tuple[Ints, Ints]:
        """Window, as a number for `Windowed.of`, and offset in it, both (n,), of places (n,) of the training."""
        subsets, within = self.split(places)
        codes, offsets = np.empty_like(places), np.empty_like(places)
        for subset in np.unique(subsets):
            chosen = subsets == subset
            epochs, windows, offsets[chosen] = self.orders[subset].windows(within[chosen])
            codes[chosen] = (epochs * SUBSETS + subset) * WINDOWS + windows
        return codes, offsets

    def window(self, key: Windowed) -> tuple[Ints, Ints]:
        """Row group and training row in it of each offset of a window, both (rows of the window,)."""
        numbers, rows = self.orders[key.subset].window(key.epoch, key.window)
        return self._groups[key.subset][numbers], rows


def growth_of(growth: Sequence[Growth], chosen: NDArray[np.bool_], share: tuple[int, int]) -> list[Growth]:
    """How a subset has grown.

    Args:
        growth: of all row groups, by place of the training.
        chosen: which row groups are of the subset, (G,).
        share: the subset's weight, and the sum of all.
    """
    weight, total = share
    return [Growth(place // total * weight, int(chosen[:parts].sum())) for place, parts in growth]
