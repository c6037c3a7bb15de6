"""What makes two pictures near duplicates, and how to find them without comparing all pairs.

Near duplicates show the same picture in another encoding, size or quality:

    their perceptual hashes differ in `tolerance` bits of 256 at most, and
    the mean colours of their 4 x 4 parts differ by `COLOUR_LEVELS` of 255 at most.

A bit says whether one of the 16 x 16 lowest frequencies of the grey picture of 64 x 64 pixels is above `SIGNAL`. The usual hash
asks for more than the median, which is close to 0 in a flag, a sign, a gradient or anything symmetric: half of its bits are then
noise of the encoding. Below `SIGNAL`, waves of a fifth of a grey level, is what encoders and resizing move.

Measured on 2,964 pictures, between any two copies of one: itself, JPEG of quality 95, 80 and 60, WebP of 80, halved, resized to
odd sizes, and both of these as JPEG of 80. "Apart" are pairs of copies that differ in more than 12 bits; in brackets with the
median in place of `SIGNAL`.

    pictures                       bits moved    apart
    252 drawn flags                15 at most    0.3 % (52 %)      bars, crosses, discs, chequers; of 256 to 512 pixels
    259 flags of OpenMoji          16            0.05 % (35 %)
    135 road signs and arrows      8             none (46 %)
    108 gradients                  9             none (60 %)
    216 banded, ringed, mirrored   8             none (45 %)
    500 scenes of little_web       7             none (3 %)        copies: JPEG and WebP of 80, halved
    700 other OpenMoji drawings    10            none (15 %)       the same copies, on white
    292 pages, titles, letters     14            0.1 % (1 %)
    252 crops of photographs       14            0.04 % (0.7 %)    of 18 photographs
    160 scenes of 1/f noise        9             none (0.01 %)
    90 faint scenes of it          17            1.2 % (29 %)      standard deviation of 3 to 10 levels

Copies move the mean colours by up to 14 levels, 99 % of them by 8 or fewer. Different pictures of one kind that pass for copies,
again with the median in brackets: 1 (1) pair of flags that hardly differ, 1 (0) of signs, 5 (1) of drawings that differ in a
detail, 1 (13) of titles that differ in their words, and 28 (24) of bars that differ in sharpness or direction. No gradients,
scenes, noise or photographs do: crops of one photograph differ by 48 bits or more. imagehash's dhash takes 1,773 pairs of titles
and pages for copies. 64 bits are too few: they give one hash to different drawings on plain ground.

Hashes that differ in k bits at most are equal in one of any k + 1 bands that their bits are dealt into (multi-index hashing,
Norouzi et al., arXiv 1307.2982): only rows that share a band are compared, and a band can be searched apart, in parts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

GREY_SIDE = 64
HASH_SIDE = 16
HASH_BYTES = HASH_SIDE * HASH_SIDE // 8
# Of a coefficient of the orthonormal DCT.
SIGNAL = 6.0
COLOUR_SIDE = 4
COLOUR_BYTES = COLOUR_SIDE * COLOUR_SIDE * 3
COLOUR_LEVELS = 16
# Of the sum of `COLOUR_BYTES` colours.
LIGHT_BITS = 14
# Pairs compared at once, which bounds the memory where very many pictures are alike.
PAIRS = 200_000


def perceptual_hash(image: Image.Image) -> bytes:
    """`HASH_BYTES` of an RGB image: which of its 16 x 16 lowest frequencies are above `SIGNAL`, rows of bits."""
    import cv2

    grey = image.convert("L").resize((GREY_SIDE, GREY_SIDE), Image.Resampling.LANCZOS)
    waves = cv2.dct(np.asarray(grey, dtype=np.float32))
    return np.packbits(waves[:HASH_SIDE, :HASH_SIDE] > SIGNAL).tobytes()


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
    # Rows of a key lie together, by brightness: pictures of equal colours are equally bright. What is plain has few bits above
    # `SIGNAL`, so that very many such rows can share a key.
    light = shades.sum(axis=1, dtype=np.int64)
    order = np.lexsort((light, keys))
    keys, light, shades = keys[order], light[order], shades[order]
    words = [np.ascontiguousarray(word) for word in hashes[order].view(np.uint64).T]
    group = np.cumsum(np.diff(keys, prepend=keys[:1]) != 0) << LIGHT_BITS
    darkest = np.searchsorted(group | light, group | np.maximum(light - COLOUR_LEVELS * COLOUR_BYTES, 0))
    alike = np.zeros(len(keys), dtype=bool)
    for one, other in _pairs(darkest, np.arange(len(keys))):
        # A row that is known to resemble one needs no second proof, and most pairs differ too much in a quarter of the bits.
        open_ = ~alike[np.maximum(order[one], order[other])]
        open_ &= np.bitwise_count(words[0][one] ^ words[0][other]) <= tolerance
        one, other = one[open_], other[open_]
        for shade in range(COLOUR_BYTES):
            mine, theirs = shades[one, shade], shades[other, shade]
            close = np.maximum(mine, theirs) - np.minimum(mine, theirs) <= COLOUR_LEVELS
            one, other = one[close], other[close]
        flipped = sum(np.bitwise_count(word[one] ^ word[other]).astype(np.int64) for word in words)
        alike[np.maximum(order[one], order[other])[flipped <= tolerance]] = True
    return alike


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
