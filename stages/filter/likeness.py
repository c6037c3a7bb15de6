"""What makes two pictures near duplicates, and how to find them without comparing all pairs.

Near duplicates show the same picture in another encoding, size or quality:

    their perceptual hashes (imagehash's phash of 256 bits) differ in `tolerance` bits at most, and
    the mean colours of their 4 x 4 parts differ by `COLOUR_LEVELS` of 255 at most.

The hash sees brightness only, so that the second rule is what keeps a red and a blue variant of one product. JPEG and WebP of
quality 80, halving and odd sizes flip up to 16 bits (95% of them 6 or fewer) and move colours by up to 4 levels; different scenes
that are drawn alike in other colours differ by 64 levels, others by 18 bits or more, photographs by 100. The usual 64 bits are
too few: they give one hash to different drawings on plain ground. Copies of what hardly has frequencies, such as a bare gradient,
can be missed: most of the bits are then noise of the encoding.

Hashes that differ in k bits at most are equal in one of any k + 1 bands that their bits are dealt into (multi-index hashing,
Norouzi et al., arXiv 1307.2982): only rows that share a band are compared, and a band can be searched apart, in parts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

HASH_SIDE = 16
HASH_BYTES = HASH_SIDE * HASH_SIDE // 8
COLOUR_SIDE = 4
COLOUR_BYTES = COLOUR_SIDE * COLOUR_SIDE * 3
COLOUR_LEVELS = 16
# Pairs compared at once, which bounds the memory where very many pictures are alike.
PAIRS = 200_000


def perceptual_hash(image: Image.Image) -> bytes:
    """`HASH_BYTES` of an RGB image: which of its 16 x 16 lowest frequencies lie above their median, rows of bits."""
    from imagehash import phash

    return np.packbits(phash(image, hash_size=HASH_SIDE).hash).tobytes()


def colours(image: Image.Image) -> bytes:
    """4 x 4 x 3 bytes of an RGB image: the mean colour of each part, rows of parts."""
    return np.asarray(image.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX), dtype=np.uint8).tobytes()


def bands(tolerance: int) -> int:
    """How many bands the bits are dealt into; hashes within the tolerance are equal in one of them."""
    return tolerance + 1


def key(hashes: np.ndarray, band: int, tolerance: int) -> np.ndarray:
    """The bits of a band as numbers, (rows,) int64; of a longer band the first 63 bits count, which only adds candidates.

    Bits are dealt like cards, so that every band has some of the low and some of the high frequencies.
    """
    found = np.zeros(len(hashes), dtype=np.int64)
    for bit in range(band, HASH_BYTES * 8, bands(tolerance))[:63]:
        found = found << 1 | (hashes[:, bit // 8] >> np.uint8(7 - bit % 8) & np.uint8(1))
    return found


def earlier_alike(keys: np.ndarray, hashes: np.ndarray, shades: np.ndarray, tolerance: int) -> np.ndarray:
    """Which rows are near duplicates of a row above them that has the same key, mask of shape (rows,).

    Args:
        keys: (rows,), in input order.
        hashes: (rows, HASH_BYTES) uint8.
        shades: (rows, COLOUR_BYTES) uint8, as of `colours`.
    """
    order = np.argsort(keys, kind="stable")
    # In this order the rows of a key are neighbours in memory.
    keys, shades = keys[order], shades[order]
    words = [np.ascontiguousarray(word) for word in hashes[order].view(np.uint64).T]
    alike = np.zeros(len(keys), dtype=bool)
    for own, other in _pairs(np.searchsorted(keys, keys, "left"), np.arange(len(keys))):
        # A row that is known to resemble one needs no second proof, and most pairs differ too much in a quarter of the bits.
        open_ = ~alike[own] & (np.bitwise_count(words[0][own] ^ words[0][other]) <= tolerance)
        own, other = own[open_], other[open_]
        flipped = sum(np.bitwise_count(word[own] ^ word[other]).astype(np.int64) for word in words)
        own, other = own[flipped <= tolerance], other[flipped <= tolerance]
        mine, theirs = shades[own], shades[other]
        same = (np.maximum(mine, theirs) - np.minimum(mine, theirs)).max(axis=1, initial=0) <= COLOUR_LEVELS
        alike[own[same]] = True
    found = np.zeros(len(keys), dtype=bool)
    found[order] = alike
    return found


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
