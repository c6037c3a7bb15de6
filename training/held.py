"""Which of the held-out rows a validation looks at: some of every input, and in it of every shard, the same ones every time.

The first of them would all be of the first shards. Each input gives as many as the others, or all that it has, and so does each
of its shards; where there are more shards than rows to look at, evenly spread ones give one each. A shard gives its first rows:
which ones are held out is chance, and few row groups are read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def spread(held: NDArray[np.integer], file: NDArray[np.integer], inputs: Ints, wanted: int) -> Ints:
    """Numbers, ascending, of at most `wanted` held-out rows, counted over all row groups.

    Args:
        held: rows held out of each row group, (G,).
        file: the shard of each row group, (G,), ascending.
        inputs: the input of each shard, (S,).
    """
    by_shard = np.bincount(file, weights=held, minlength=len(inputs)).astype(np.int64)
    taken = np.zeros_like(by_shard)
    _, which = np.unique(inputs, return_inverse=True)
    by_input = np.bincount(which, weights=by_shard).astype(np.int64)
    for number, quota in enumerate(shared_out(by_input, wanted)):
        members = np.flatnonzero(which == number)
        taken[members] = shared_out(by_shard[members], int(quota))
    starts = np.cumsum(by_shard) - by_shard
    return np.concatenate([start + np.arange(count) for start, count in zip(starts, taken, strict=True)]).astype(np.int64)


def shared_out(have: Ints, wanted: int) -> Ints:
    """Takes `wanted` in all, or all that there is, from those that have so many, from each as many as from the others.

    >>> shared_out(np.array([1, 9, 9, 0]), 8).tolist()
    [1, 4, 3, 0]
    """
    taken = np.zeros_like(have)
    left = min(wanted, int(have.sum()))
    while left:
        giving = np.flatnonzero(have > taken)
        each = left // len(giving)
        if each == 0:
            # Evenly spread ones give one more.
            giving, each = giving[np.arange(left) * len(giving) // left], 1
        more = np.minimum(each, have[giving] - taken[giving])
        taken[giving] += more
        left -= int(more.sum())
    return taken
