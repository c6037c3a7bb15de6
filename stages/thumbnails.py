"""What makes two pictures near duplicates: thumbnails of 16 x 16 pixels that differ little, wherever one looks.

Near duplicates show the same picture in another encoding, size or quality. Their thumbnails differ

    by at most `tolerance` levels (of 255) in every pixel and channel, and
    by at most a quarter of it in the brightness of every quarter of the picture.

Noise of an encoding averages out over a quarter, so the second rule costs few of them, and it is what a search can go by: see
`earlier_alike` here and `Region` in `stages.regions`. On the little web's images JPEG and WebP down to quality 30, halving and
odd resizing change pixels by at most 8 levels and quarters by at most 3; different scenes differ by 50 levels or more. The usual
64-bit perceptual hashes see neither colour nor a small drawing on a plain background.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from PIL import Image

SIDE = 16
THUMBNAIL_BYTES = SIDE * SIDE * 3
QUARTERS = 4
# Pairs compared at once, which bounds the memory where very many pictures are alike.
PAIRS = 200_000


def thumbnail(image: Image.Image) -> bytes:
    """16 x 16 x 3 bytes of an RGB image, rows of pixels."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.uint8).tobytes()


def brightness(thumbnails: np.ndarray) -> np.ndarray:
    """Mean luma of the upper left, upper right, lower left and lower right quarter, (rows, 4) uint8, rounded down.

    Luma in eighths, (2 R + 5 G + B) / 8: what JPEG's chroma loses must not show in it.
    """
    halves = thumbnails.reshape(len(thumbnails), 2, SIDE // 2, 2, SIDE // 2, 3)
    sums = halves.sum(axis=(2, 4), dtype=np.int64) @ np.array([2, 5, 1])
    return (sums // (8 * (SIDE // 2) ** 2)).reshape(len(thumbnails), QUARTERS).astype(np.uint8)


def brightness_tolerance(tolerance: int) -> int:
    return tolerance // 4


def earlier_alike(thumbnails: np.ndarray, tolerance: int, asked: np.ndarray | None = None) -> np.ndarray:
    """Which rows are near duplicates of a row above them, mask of shape (rows,).

    Rows are sorted into the cells of a grid over the four quarters' brightness, whose side is one more than its tolerance, and
    only rows of neighbouring cells are compared.

    Args:
        thumbnails: (rows, THUMBNAIL_BYTES) uint8, in input order.
        asked: mask of the rows that are asked about (the others are only compared with); None asks about all.
    """
    quarters = brightness(thumbnails)
    side = brightness_tolerance(tolerance) + 1
    cells = quarters.astype(np.int64) // side
    numbers = _number(cells)
    order = np.argsort(numbers, kind="stable")
    numbers = numbers[order]
    # Asked in the order of the grid: neighbours in the search are then neighbours in memory.
    wanted = order if asked is None else order[asked[order]]
    alike = np.zeros(len(thumbnails), dtype=bool)
    for step in sorted(product((-1, 0, 1), repeat=QUARTERS - 1), key=lambda step: sum(map(abs, step))):
        # Cells that neighbour in the last quarter lie side by side, so one range holds all three.
        low = np.searchsorted(numbers, _number(cells[wanted] + (*step, -1)), "left")
        high = np.searchsorted(numbers, _number(cells[wanted] + (*step, 1)), "right")
        for place, found in _pairs(low, high):
            own, other = wanted[place], order[found]
            # A row that is known to resemble one needs no second proof.
            open_ = ~alike[own] & (other < own)
            own, other = own[open_], other[open_]
            close = _close(quarters, side - 1, own, other, slice(None))
            # A few pixels first, since most pairs differ in them already.
            for pixels in (slice(0, THUMBNAIL_BYTES, 37), slice(None)):
                own, other = own[close], other[close]
                close = _close(thumbnails, tolerance, own, other, pixels)
            alike[own[close]] = True
    return alike


def _number(cells: np.ndarray) -> np.ndarray:
    # Coordinates run from -1 (a neighbour of the first cell) to 256.
    first, second, third, fourth = (cells[:, axis] + 1 for axis in range(QUARTERS))
    return ((first * 512 + second) * 512 + third) * 512 + fourth


def _close(values: np.ndarray, tolerance: int, own: np.ndarray, other: np.ndarray, columns: slice) -> np.ndarray:
    """Mask over pairs of rows."""
    mine, theirs = values[own, columns], values[other, columns]
    return (np.maximum(mine, theirs) - np.minimum(mine, theirs)).max(axis=1, initial=0) <= tolerance


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
