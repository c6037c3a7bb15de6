"""Near duplicates: the same picture in another encoding, size or quality, told by thumbnails of 16 x 16 pixels.

Two pictures are near duplicates when their thumbnails differ by at most `tolerance` levels (of 255) in every pixel and channel.
On the little web's scenes, JPEG down to quality 30, WebP and halving or odd resizing stay within 17 levels, while different
scenes differ by 50 or more. The usual 64-bit perceptual hashes see neither colour nor a small drawing on a plain background.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from PIL import Image

SIDE = 16
THUMBNAIL_BYTES = SIDE * SIDE * 3
# Pairs compared at once, which bounds the memory where very many pictures have like colours.
PAIRS = 200_000


def thumbnail(image: Image.Image) -> bytes:
    """16 x 16 x 3 bytes of an RGB image, rows of pixels."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.uint8).tobytes()


class Near:
    """Which rows of one shard resemble an earlier row; memory grows with this shard, not with the others.

    No two thumbnails that are within the tolerance have channel means further apart than it. So rows are sorted into cells of
    a colour cube whose side is just larger, and only rows of neighbouring cells are compared.
    """

    def __init__(self, thumbnails: np.ndarray, tolerance: int):
        """`thumbnails`: (rows, THUMBNAIL_BYTES) uint8 in row order; `tolerance`: levels of 255."""
        self.thumbnails = thumbnails
        self.tolerance = tolerance
        self.resembles = np.zeros(len(thumbnails), dtype=bool)
        cells = self._number(self._cells(thumbnails))
        self.order = np.argsort(cells, kind="stable")
        self.cells = cells[self.order]
        self._compare(thumbnails, within=True)

    def add(self, thumbnails: np.ndarray) -> None:
        """Thumbnails of rows that come before the whole shard, (rows, THUMBNAIL_BYTES) uint8."""
        self._compare(thumbnails, within=False)

    def _cells(self, thumbnails: np.ndarray) -> np.ndarray:
        means = thumbnails.reshape(len(thumbnails), SIDE * SIDE, 3).mean(axis=1)
        return (means // (self.tolerance + 1)).astype(np.int64)

    @staticmethod
    def _number(cells: np.ndarray) -> np.ndarray:
        # Coordinates run from -1 (a neighbour of the first cell) to 256.
        return ((cells[:, 0] + 1) * 512 + cells[:, 1] + 1) * 512 + cells[:, 2] + 1

    def _compare(self, others: np.ndarray, within: bool) -> None:
        cells = self._cells(others)
        for step in product((-1, 0, 1), repeat=3):
            wanted = self._number(cells + np.array(step))
            low, high = np.searchsorted(self.cells, wanted, "left"), np.searchsorted(self.cells, wanted, "right")
            for other, place in _pairs(low, high):
                own = self.order[place]
                # A row that is known to resemble one needs no second proof.
                open_ = ~self.resembles[own] & (other < own if within else True)
                own, other = own[open_], other[open_]
                close = self._close(own, others, other)
                self.resembles[own[close]] = True

    def _close(self, own: np.ndarray, others: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Mask over pairs; a few pixels first, since most pairs differ in them already."""
        close = np.ones(len(own), dtype=bool)
        for pixels in (slice(0, THUMBNAIL_BYTES, 37), slice(None)):
            left = np.flatnonzero(close)
            mine, theirs = self.thumbnails[own[left], pixels], others[other[left], pixels]
            gap = np.maximum(mine, theirs) - np.minimum(mine, theirs)
            close[left] = gap.max(axis=1, initial=0) <= self.tolerance
        return close


def _pairs(low: np.ndarray, high: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(row, place) for every place in low[row] .. high[row] - 1, up to about PAIRS at a time."""
    counts = high - low
    ends = np.cumsum(counts)
    start = 0
    while start < len(low) and ends[-1] > (done := ends[start - 1] if start else 0):
        stop = max(start + 1, int(np.searchsorted(ends, done + PAIRS, "right")))
        some = counts[start:stop]
        row = np.repeat(np.arange(start, stop), some)
        first = np.repeat(ends[start:stop] - some, some)
        yield row, np.repeat(low[start:stop], some) + np.arange(done, done + len(row)) - first
        start = stop
