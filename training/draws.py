"""Everything random about the samples, as a pure function of (seed, stream, place): counters, and no state.

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), as numpy has it, gives four words of 64 bits for
every counter. A place of a stream owns a stretch of counters, and places in a row own stretches in a row, so that one call
makes the words of a whole batch:

    key      (seed, 0)
    counter  (place * n + i, stream, 0, 0)      i = 0 .. n - 1, with n counters for each place

The streams are numbered apart from those of `training.order`, whose counters look alike. What draws a few numbers in 0 .. 1 for a
place (`training.timesteps`, `training.captions`) has another second word of the key. Box and Muller's transform makes two normal
numbers of two halves of a word. It runs on the host, for every device alike, so the numbers are the same on all of
them; only another processor's vector units can round a logarithm or a cosine otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TRAIN, VALIDATION = 2, 3
WORDS = 4
# Bytes of random words that are turned into normal numbers at once: they and what is made of them stay in a core's cache.
AT_ONCE = 2**19


def random_words(seed: int, stream: int, first: int, count: int, each: int) -> NDArray[np.int32]:
    """At least `each` random words of 32 bits for each of the places `first` to `first + count` - 1, (count, n)."""
    counters = -(-each // (2 * WORDS))
    generator = np.random.Philox(key=[seed, 0], counter=[first * counters, stream, 0, 0])
    return generator.random_raw(count * counters * WORDS).view(np.int32).reshape(count, -1)


def uniform(seed: int, key: int, places: NDArray[np.int64], each: int, stream: int = 0) -> NDArray[np.float64]:
    """Independent numbers in 0 .. 1, (n, each), for places (n,), n of 1 or more: each place has counters of its own."""
    counters = -(-each // WORDS)
    # Places that follow each other are one stretch of the generator's numbers.
    stretches = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    words = []
    for stretch in stretches:
        generator = np.random.Philox(key=[seed, key], counter=[int(stretch[0]) * counters, stream, 0, 0])
        words.append(generator.random_raw(len(stretch) * counters * WORDS))
    found = np.concatenate(words).reshape(len(places), counters * WORDS)[:, :each]
    return (found >> np.uint64(11)).astype(np.float64) * 2.0**-53


def fill_normal(seed: int, stream: int, first: int, outs: Sequence[NDArray[np.float32]]) -> None:
    """Fill arrays (n, size) with independent standard normal numbers; row i of each is that of place `first` + i."""
    widths = [2 * -(-out.shape[1] // 2) for out in outs]
    count, each = len(outs[0]), sum(widths)
    rows = max(1, AT_ONCE // (4 * each))
    for start in range(0, count, rows):
        words = random_words(seed, stream, first + start, min(rows, count - start), each)
        column = 0
        for out, width in zip(outs, widths, strict=True):
            _box_muller(words[:, column : column + width], out[start : start + rows])
            column += width


def _box_muller(words: NDArray[np.int32], out: NDArray[np.float32]) -> None:
    """Normal numbers (n, size) from words (n, 2 m) where m is half the size, rounded up: lengths, then angles.

    A length has 31 bits, and half of the last one is added, so that it is never the logarithm of 0; the greatest is 6.7.
    """
    half = words.shape[1] // 2
    length = (words[:, :half] & 0x7FFFFFFF).astype(np.float32)
    length += np.float32(0.5)
    length *= np.float32(2.0**-31)
    np.log(length, out=length)
    length *= np.float32(-2.0)
    np.sqrt(length, out=length)
    angle = words[:, half:].astype(np.float32)
    angle *= np.float32(math.pi * 2.0**-31)
    np.multiply(length, np.cos(angle), out=out[:, :half])
    rest = out.shape[1] - half
    np.multiply(length[:, :rest], np.sin(angle[:, :rest]), out=out[:, half:])
