"""What makes two pictures near duplicates.

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
"""

from __future__ import annotations

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


def perceptual_hash(image: Image.Image) -> bytes:
    """`HASH_BYTES` of an RGB image: which of its 16 x 16 lowest frequencies are above `SIGNAL`, rows of bits."""
    import cv2

    grey = image.convert("L").resize((GREY_SIDE, GREY_SIDE), Image.Resampling.LANCZOS)
    waves = cv2.dct(np.asarray(grey, dtype=np.float32))
    return np.packbits(waves[:HASH_SIDE, :HASH_SIDE] > SIGNAL).tobytes()


def colours(image: Image.Image) -> bytes:
    """4 x 4 x 3 bytes of an RGB image: the mean colour of each part, rows of parts."""
    return np.asarray(image.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX), dtype=np.uint8).tobytes()


def alike(
    hashes: np.ndarray,
    shades: np.ndarray,
    one: np.ndarray,
    hashes_other: np.ndarray,
    shades_other: np.ndarray,
    other: np.ndarray,
    tolerance: int,
) -> np.ndarray:
    """Which pairs are near duplicates, mask of shape (pairs,).

    Args:
        hashes, shades: (rows, HASH_BYTES) and (rows, COLOUR_BYTES) uint8, of what `one` picks a row a pair; the bits of all
            hashes are in one order, whatever that is. Likewise what `other` picks.
    """  # fmt: skip
    found = np.zeros(len(one), bool)
    words, words_other = hashes.view(np.uint64), hashes_other.view(np.uint64)
    # Most pairs differ too much in a quarter of the bits, or in the colour of a corner.
    open_ = np.flatnonzero(np.bitwise_count(words[one, 0] ^ words_other[other, 0]) <= tolerance)
    for shade in (0, 16, 31, 47):
        mine, theirs = shades[one[open_], shade], shades_other[other[open_], shade]
        open_ = open_[np.maximum(mine, theirs) - np.minimum(mine, theirs) <= COLOUR_LEVELS]
    one, other = one[open_], other[open_]
    mine, theirs = shades[one], shades_other[other]
    close = (np.maximum(mine, theirs) - np.minimum(mine, theirs) <= COLOUR_LEVELS).all(axis=1)
    found[open_] = close & (np.bitwise_count(words[one] ^ words_other[other]).sum(axis=1) <= tolerance)
    return found
