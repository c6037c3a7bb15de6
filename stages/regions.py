"""Cuts a set of thumbnails into regions that can be searched for near duplicates apart, each by a worker that reads little else.

A region is a box in the space of the four quarters' brightness. Near duplicates differ there by at most a few levels, so whoever
knows the rows of a box and of that margin around it knows all that the box's rows can resemble.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stages.thumbnails import QUARTERS

# A cut that leaves nearly all rows in the margins of both sides separates nothing.
GAIN = 0.9


@dataclass(frozen=True)
class Region:
    """low <= brightness < high in every quarter."""

    low: tuple[int, ...] = (0,) * QUARTERS
    high: tuple[int, ...] = (256,) * QUARTERS

    def holds(self, quarters: np.ndarray, margin: int = 0) -> np.ndarray:
        """Mask over (rows, 4) brightness, of the rows in the region or in the margin around it."""
        quarters = quarters.astype(np.int16)
        inside = (quarters >= np.array(self.low) - margin) & (quarters < np.array(self.high) + margin)
        return np.asarray(inside.all(axis=1))

    def cut(self, axis: int, at: int) -> tuple[Region, Region]:
        below, above = list(self.high), list(self.low)
        below[axis] = above[axis] = at
        return Region(self.low, tuple(below)), Region(tuple(above), self.high)


def regions(
    quarters: np.ndarray, weights: np.ndarray, margin: int, limit: float, whole: Region | None = None
) -> Iterator[Region]:
    """Regions that cover everything and hold, with their margins, about `limit` rows at most.

    Only pictures that are alike in all four quarters cannot be cut apart.

    Args:
        quarters: brightness of a sample of the rows, (samples, 4) uint8.
        weights: rows that each of these stands for, (samples,).
    """
    whole = whole or Region()
    held = whole.holds(quarters, margin)
    quarters, weights = quarters[held], weights[held]
    total = weights.sum()
    best: tuple[float, tuple[Region, Region]] | None = None
    for axis in range(QUARTERS if total > limit else 0):
        at = int(np.median(quarters[:, axis].clip(whole.low[axis], whole.high[axis])))
        if whole.low[axis] < at < whole.high[axis]:
            halves = whole.cut(axis, at)
            most = max(weights[half.holds(quarters, margin)].sum() for half in halves)
            if best is None or most < best[0]:
                best = most, halves
    if best is None or best[0] > GAIN * total:
        yield whole
        return
    for half in best[1]:
        yield from regions(quarters, weights, margin, limit, half)


def curve(quarters: np.ndarray) -> np.ndarray:
    """Order of rows along a Z-curve (Morton order), (rows,) indices: what is near in it is near in all four quarters."""
    code = np.zeros(len(quarters), dtype=np.int64)
    for bit in range(7, -1, -1):
        for axis in range(QUARTERS):
            code = code * 2 + (quarters[:, axis] >> bit & 1)
    return np.argsort(code, kind="stable")
