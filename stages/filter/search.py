"""Finds near duplicates among very many pictures, in a time that grows with the pictures and not with their pairs.

Hashes that differ in k bits at most are equal in one of any k + 1 bands that their bits are dealt into (multi-index hashing,
Norouzi et al., arXiv 1307.2982), and pictures of like colours are equally bright: only rows that share a band and are about as
bright are compared. Of those that do, a row looks for the first alike that comes before it, from the first on: of a million
copies of one picture all meet the first copy at once, and no copy meets another. What is left is, in a bucket, each row against
the first of each picture that lies in it.

Which rows go is decided from first to last: a row goes when it is alike to one that stays. Each row's first alike decides nearly
all: a row that has none stays, and a row whose first alike stays goes. Only rows whose first alike itself goes are looked at
again (`decide`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stages.filter.likeness import COLOUR_BYTES, COLOUR_LEVELS, HASH_BYTES, alike

# Of the summed colours of a picture: what lies within the tolerance of it is as bright up to half of this, so that it lies in the
# same cell or in the nearer of its two neighbours.
CELL = 2 * COLOUR_LEVELS * COLOUR_BYTES
# Odd numbers that spread band, bits and brightness over 64 bits; rows that meet by chance are only compared in vain.
SPREAD = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
# Leading bits of a key by which rows are told that can meet none of another block.
TABLE_BITS = 22
# Pairs compared at once, which bounds the memory.
PAIRS = 200_000
# Low bits of a rank: a row's number in the whole set. Above them, what is less for a larger picture.
NUMBER_BITS = 32
NUMBER = 2**NUMBER_BITS - 1
NOTHING = np.int64(2**63 - 1)


def ranks(pixels: np.ndarray, first: int) -> np.ndarray:
    """Which picture comes before which: the larger one, and of two that are equally large the earlier.

    Args:
        pixels: (rows,), of rows whose numbers in the whole set are `first` and those after it.

    Returns:
        (rows,) int64; all numbers are less than 2 ** 32.
    """
    smaller = 2**31 - 1 - np.minimum(pixels.astype(np.int64), 2**31 - 1)
    return smaller << NUMBER_BITS | np.arange(first, first + len(pixels))


def deal(hashes: np.ndarray, tolerance: int) -> np.ndarray:
    """The same bits with those of each band together: every band gets some of the low and some of the high frequencies."""
    order = np.concatenate([np.arange(band, HASH_BYTES * 8, tolerance + 1) for band in range(tolerance + 1)])
    parts = np.array_split(hashes, len(hashes) // PAIRS + 1)
    return np.concatenate([np.packbits(np.unpackbits(part, axis=1)[:, order], axis=1) for part in parts]).copy("C")


@dataclass(frozen=True)
class Looks:
    """What rows look like: dealt hashes (rows, HASH_BYTES), colours (rows, COLOUR_BYTES), and ranks (rows,)."""

    hashes: np.ndarray
    shades: np.ndarray
    ranks: np.ndarray
    tolerance: int

    def __len__(self) -> int:
        return len(self.ranks)

    def take(self, rows: np.ndarray) -> Looks:
        return Looks(self.hashes[rows], self.shades[rows], self.ranks[rows], self.tolerance)

    @cached_property
    def light(self) -> np.ndarray:
        return self.shades.sum(axis=1, dtype=np.uint16)

    def keys(self, band: int, beside: bool = False) -> np.ndarray:
        """(rows,) uint64, of the bits of a band and the cell of brightness, or the nearer cell `beside` it."""
        begins = sum(len(range(before, HASH_BYTES * 8, self.tolerance + 1)) for before in range(band))
        length = len(range(band, HASH_BYTES * 8, self.tolerance + 1))
        # Of a band that is longer than what an 8-byte word holds of it the first bits count, which only adds candidates.
        byte = min(begins // 8, HASH_BYTES - 8)
        skip = begins - byte * 8
        word = np.ascontiguousarray(self.hashes[:, byte : byte + 8]).view(">u8").ravel().astype(np.uint64)
        bits = (word << np.uint64(skip)) >> np.uint64(64 - min(length, 64 - skip))
        cell = (self.light // CELL).astype(np.int64)
        if beside:
            cell += np.where(self.light % CELL < CELL // 2, -1, 1)
        of_band = np.uint64((band + 1) * SPREAD[2] % 2**64)
        return bits * np.uint64(SPREAD[0]) + cell.astype(np.uint64) * np.uint64(SPREAD[1]) + of_band


def point(some: Looks, others: Looks, best: np.ndarray, best_other: np.ndarray) -> None:
    """Look in each of two blocks for what comes before, and is alike to, a row of the other; a block may be held against itself.

    Args:
        best, best_other: (rows,) of each block, the rank of the first alike that is known by now, or more; is lowered.
    """
    for band in range(some.tolerance + 1):
        if some is others:
            everything = np.arange(len(some))
            _search(some, everything, some, everything, band, best)
            continue
        mine, theirs = _that_meet(some, others, band)
        _search(some, mine, others, theirs, band, best)
        _search(others, theirs, some, mine, band, best_other)


def _that_meet(some: Looks, others: Looks, band: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of two blocks that may share a key: a small block meets little of a large one."""
    rows = []
    for block, other in ((some, others), (others, some)):
        table = np.zeros(2**TABLE_BITS, bool)
        for beside in (False, True):
            table[other.keys(band, beside) >> np.uint64(64 - TABLE_BITS)] = True
        rows.append(np.flatnonzero(table[block.keys(band) >> np.uint64(64 - TABLE_BITS)]))
    return rows[0], rows[1]


def _search(seekers: Looks, mine: np.ndarray, targets: Looks, theirs: np.ndarray, band: int, best: np.ndarray) -> None:
    """Lower `best` of the seekers' rows `mine` to the first alike among the targets' rows `theirs` with their key."""
    if not len(mine) or not len(theirs):
        return
    keys = targets.keys(band)[theirs]
    order = np.lexsort((targets.ranks[theirs], keys))
    keys, theirs = keys[order], theirs[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    ends, known, before = np.append(starts[1:], len(keys)), keys[starts], targets.ranks[theirs]
    for beside in (False, True):
        wanted = seekers.keys(band, beside)[mine]
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        met = known[at] == wanted
        rows, low, end, together = mine[met], starts[at[met]], ends[at[met]], 1
        while len(rows):
            # What comes first in a bucket is tried first, by all; who has not met one alike tries twice as many then.
            going = (low < end) & (before[np.minimum(low, len(before) - 1)] < best[rows])
            rows, low, end = rows[going], low[going], end[going]
            stop = np.minimum(low + together, end)
            for place, found in _pairs(low, stop):
                sooner = before[found] < best[rows[place]]
                one, other = rows[place[sooner]], found[sooner]
                same = alike(
                    seekers.hashes, seekers.shades, one, targets.hashes, targets.shades, theirs[other], seekers.tolerance
                )
                np.minimum.at(best, one[same], before[other[same]])
            low, together = stop, together * 2


def _pairs(low: np.ndarray, high: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(place, found) for every found in low[place] .. high[place] - 1, up to about PAIRS at a time."""
    counts = high - low
    ends = np.cumsum(counts)
    start = 0
    while start < len(low) and ends[-1] > (done := ends[start - 1] if start else 0):
        stop = max(start + 1, int(np.searchsorted(ends, done + PAIRS, "right")))
        some = counts[start:stop]
        place = np.repeat(np.arange(start, stop), some)
        first = np.repeat(ends[start:stop] - some, some)
        yield place, np.repeat(low[start:stop], some) + np.arange(done, done + len(place)) - first
        start = stop


def decide(sizes: Sequence[int], best: Callable[[int], np.ndarray], looks: Callable[[int], Looks]) -> np.ndarray:
    """Which rows go, by the rule above.

    Args:
        sizes: rows of each block.
        best: block -> (rows,) rank of the first alike of each row in the whole set, `NOTHING` where there is none.
        looks: block -> its looks, asked for only if a row's first alike goes.

    Returns:
        Mask over the rows of all blocks.
    """
    edges = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    second, gone = np.zeros(edges[-1], bool), np.zeros(edges[-1], bool)
    for block in range(len(sizes)):
        second[edges[block] : edges[block + 1]] = best(block) != NOTHING
    unclear = []
    for block in range(len(sizes)):
        found = best(block)
        rows = np.flatnonzero(found != NOTHING)
        clear = ~second[found[rows] & NUMBER]
        gone[edges[block] + rows[clear]] = True
        unclear.append(rows[~clear])
    if any(map(len, unclear)):
        parts = [looks(block).take(rows) for block, rows in enumerate(unclear) if len(rows)]
        left = Looks(
            np.concatenate([part.hashes for part in parts]),
            np.concatenate([part.shades for part in parts]),
            np.concatenate([part.ranks for part in parts]),
            parts[0].tolerance,
        )
        first = left.ranks.copy()
        for block in range(len(sizes)):
            others = looks(block).take(np.flatnonzero(~second[edges[block] : edges[block + 1]]))
            point(left, others, first, others.ranks.copy())
        beaten = first < left.ranks
        rest = left.take(np.flatnonzero(~beaten))
        gone[left.ranks[beaten] & NUMBER] = True
        gone[rest.ranks[~in_turn(rest)] & NUMBER] = True
    return gone


def in_turn(looks: Looks) -> np.ndarray:
    """Mask of the rows that stay when each is held, in its turn, against those that stay before it."""
    bands = range(looks.tolerance + 1)
    own = np.stack([looks.keys(band) for band in bands], axis=1).tolist()
    beside = np.stack([looks.keys(band, True) for band in bands], axis=1).tolist()
    stays, kept = np.zeros(len(looks), bool), dict[int, list[int]]()
    for row in np.argsort(looks.ranks).tolist():
        met = sorted({other for key in (*own[row], *beside[row]) for other in kept.get(key, ())})
        one, other = np.full(len(met), row), np.array(met, dtype=np.int64)
        if not alike(looks.hashes, looks.shades, one, looks.hashes, looks.shades, other, looks.tolerance).any():
            stays[row] = True
            for key in own[row]:
                kept.setdefault(key, []).append(row)
    return stays
