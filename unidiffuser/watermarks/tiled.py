"""A mark that needs no weights: a spread spectrum in a tile that repeats, read without the original picture.

The published method is that of Kalker, Depovere, Haitsma and Maes, "A video watermarking system for broadcast monitoring"
(1999). The brightness of cells is moved a little, up or down by a fixed pattern of 32 x 32 signs that repeats. A quarter of the
cells is the pattern alone: a detector finds its shift and scale by correlation. The others carry 32 bits of code and 24 bits of
the code's SHA-256, 13 or 14 cells a bit. A cell is 4 pixels of 256, and larger in larger pictures: resizing moves it nowhere.
Since the tile repeats, a part of a picture has some or all of it. A cell is moved only as far as the picture itself does not
have its sign already: on a plain ground by less than one grey level, which a person does not see, and further the busier it and
all cells around it are. What is less than a level is dithered: so many of the cell's pixels are one level brighter.

`docs/results/watermark.md` is what was measured of it. Weak as it is on plain grounds, it does not outlive JPEG 50 there, and
half the size as JPEG 75 neither; of a photograph, most parts of half the width and height are too small.

How often a clean picture is taken for a marked one: four tiles are read of a picture, as of a whole one and from the three
places where the pattern correlates best, each with its 8 faintest bits both ways, which is 1,024 readings. A reading counts if
its last 24 bits are the first of the SHA-256 of the 32 before them. Those of a clean picture, however regular it is, have
nothing to do with SHA-256, and fit with a probability of 2^-24. So at most 1,024 / 2^24 = 2^-14 of clean pictures are taken for
marked: 1 in 16,384.

Why it is here, and no library's: `benchmarks.watermark` compares. Of invisible-watermark, dwtDct and dwtDctSvd do not outlive
JPEG 75 or a crop on pictures with plain areas; it has no false-positive rate, no release since 2023, and brings a second
OpenCV.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from unidiffuser.watermarks import CHECK, CODE, Found, check_of

# The faintest bits, which are tried both ways.
TURNED = 8
# Cells a side of the tile, those of the pattern alone, and cells along the shorter side of a picture.
TILE, FIXED, ACROSS = 32, 256, 64
# Pixels of a cell at least, and of the shorter side of a picture that has the whole tile then.
CELL, SMALLEST = 4, 128
# Grey levels by which a cell is moved at most, of a share of the deviation inside the least busy of its nine: on a plain ground,
# and anywhere; and by which it is to differ from its neighbours, if it may be moved so far.
FLAT, MOST, SHARE, LEVEL = 0.9, 8.0, 2.0, 2.0
ROUNDS = 4
# Shares of a grey level from which on the pixels of 4 x 4 are one level brighter.
DITHER = (np.array([[15, 7, 13, 5], [3, 11, 1, 9], [12, 4, 14, 6], [0, 8, 2, 10]]) + 0.5) / 16
# Grey levels that are added to what a cell's neighbours differ, before its own difference is divided by it.
STILL = 0.2
# The cells that are looked for: from those of a whole picture to those of a part of half its width, each so much larger.
STEP, LARGEST = 1.01, 2.1
# So many of the best places are looked at closely, so many times, each time half as far around.
PLACES, CLOSER = 3, 2


class Tiled:
    """The mark of pictures of `SMALLEST` pixels or more; a smaller one is given back as it is."""

    name, smallest = "tiled", SMALLEST

    def embed(self, picture: Image.Image, code: int) -> Image.Image:
        """The RGB picture with a code, 0 .. 2^32 - 1."""
        side = min(picture.size)
        if side < SMALLEST:
            return picture
        cell = max(CELL, side / ACROSS)
        across, down = (int(np.ceil(length / cell)) for length in picture.size)
        signs, roles = _pattern()
        tile = np.where(roles < 0, signs, signs * _bits(code)[roles])
        moved = _moved(*_cells(picture, across, down), _repeated(tile, down, across))
        box = (0, 0, picture.width / cell, picture.height / cell)
        # Unlike a bicubic one this filter goes beyond no cell's own value.
        wave = np.asarray(Image.fromarray(moved).resize(picture.size, Image.Resampling.HAMMING, box))
        raised = wave + _repeated(DITHER, picture.height, picture.width)
        pixels = np.floor(np.asarray(picture, np.float32) + raised[:, :, None])
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    def find(self, picture: Image.Image) -> Found | None:
        """The mark of a picture that is whole, resized or compressed, or a part of it; see the module for what it outlives."""
        grey = picture.convert("L").convert("F")
        side = min(grey.size)
        if side < TILE:
            return None
        # Most pictures are whole, which takes no search.
        if (found := _read(_seen(grey, side / ACROSS, 0.0, 0.0))) is not None:
            return found
        sizes = side / ACROSS * STEP ** np.arange(np.log(LARGEST) / np.log(STEP))
        seen = [_seen(grey, size, x * size, y * size) for size in sizes for x in (0.0, 0.5) for y in (0.0, 0.5)]
        best = sorted(seen, key=_clearness, reverse=True)[:PLACES]
        return next((found for each in best if (found := _read(_closer(grey, each))) is not None), None)


class _Seen(NamedTuple):
    """What is seen of a picture if its cells have a size in pixels, and begin there."""

    size: float
    left: float
    top: float
    tile: np.ndarray
    likeness: np.ndarray


def _seen(grey: Image.Image, size: float, left: float, top: float) -> _Seen:
    tile = _tile(grey, size, left, top)
    return _Seen(size, left, top, tile, _likeness(tile))


def _clearness(seen: _Seen) -> float:
    return float(seen.likeness.max())


def _closer(grey: Image.Image, seen: _Seen) -> _Seen:
    """The best of the places around one, nearer and nearer."""
    for halved in range(1, CLOSER + 1):
        part = 0.5**halved
        around = (_seen(grey, *place) for place in _around_place(seen, (STEP - 1) * part, part / 2))
        seen = max((seen, *around), key=_clearness)
    return seen


def _around_place(seen: _Seen, larger: float, shifted: float) -> Iterator[tuple[float, float, float]]:
    """Sizes and beginnings around a place, by shares of its size."""
    for more, right, down in itertools.product((-1, 0, 1), repeat=3):
        size = seen.size * (1 + more * larger)
        left, top = seen.left + right * shifted * seen.size, seen.top + down * shifted * seen.size
        yield size, left % size, top % size


@cache
def _pattern() -> tuple[np.ndarray, np.ndarray]:
    """The signs (TILE, TILE), +1 or -1, and which bit each cell carries, 0 .. CODE + CHECK - 1; -1 is the pattern alone."""
    rng = np.random.Generator(np.random.PCG64(0x756E6964))
    signs = rng.integers(0, 2, (TILE, TILE)) * 2.0 - 1.0
    roles = np.concatenate([np.full(FIXED, -1), np.arange(TILE * TILE - FIXED) % (CODE + CHECK)])
    return signs, rng.permutation(roles).reshape(TILE, TILE)


def _bits(code: int) -> np.ndarray:
    """The code and its check, (CODE + CHECK,), +1 or -1, the code's lowest bit first."""
    return np.array([(check_of(code) << CODE | code) >> place & 1 for place in range(CODE + CHECK)]) * 2.0 - 1.0


def _repeated(tile: np.ndarray, down: int, across: int) -> np.ndarray:
    """A tile again and again, (down, across)."""
    return np.tile(tile, (-(-down // tile.shape[0]), -(-across // tile.shape[1])))[:down, :across]


def _cells(picture: Image.Image, across: int, down: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each cell in grey levels, (down, across), and the deviation inside it."""
    grey = np.asarray(picture.convert("L"), np.float32)
    mean, square = (
        np.asarray(Image.fromarray(values).resize((across, down), Image.Resampling.BOX)) for values in (grey, grey**2)
    )
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _moved(grey: np.ndarray, busy: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """By how many grey levels each cell is moved, (down, across), so that it differs from its neighbours by its sign."""
    # The least busy of the nine: beside an outline a plain ground is plain.
    most = np.clip(SHARE * np.min(list(_nine(busy)), axis=0), FLAT, MOST)
    wanted = np.minimum(most, LEVEL)
    moved = np.zeros_like(grey)
    for _ in range(ROUNDS):
        seen = grey + moved
        lacking = wanted - signs * (seen - _around(seen))
        moved = (signs * np.clip(signs * moved + lacking, 0, most)).astype(np.float32)
    return moved


def _nine(cells: np.ndarray) -> Iterator[np.ndarray]:
    """Each cell and its eight neighbours, one after another (down, across)."""
    padded, (down, across) = np.pad(cells, 1, mode="edge"), cells.shape
    return (padded[y : y + down, x : x + across] for y in range(3) for x in range(3))


def _around(cells: np.ndarray) -> np.ndarray:
    """The mean of the eight neighbours of each cell."""
    return (sum(_nine(cells)) - cells) / 8


def _tile(grey: Image.Image, cell: float, left: float, top: float) -> np.ndarray:
    """The tile (TILE, TILE) that repeats in a picture, if its cells have a size in pixels and begin there: their sum.

    Each counts with its difference from its neighbours, as a share of theirs and up to 1: beyond that it is the picture's own.
    """
    across, down = int((grey.width - left) / cell), int((grey.height - top) / cell)
    box = (left, top, left + across * cell, top + down * cell)
    cells = np.asarray(grey.resize((across, down), Image.Resampling.BOX, box))
    differing = cells - _around(cells)
    whole = np.zeros((-(-down // TILE) * TILE, -(-across // TILE) * TILE))
    whole[:down, :across] = np.clip(differing / (STILL + _around(np.abs(differing))), -1, 1)
    return whole.reshape(whole.shape[0] // TILE, TILE, whole.shape[1] // TILE, TILE).sum((0, 2))


@cache
def _alone() -> np.ndarray:
    """The conjugate spectrum of the cells that are the pattern alone."""
    signs, roles = _pattern()
    return np.conj(np.fft.rfft2(np.where(roles < 0, signs, 0.0)))


def _likeness(tile: np.ndarray) -> np.ndarray:
    """The correlation of the pattern with a tile, -1 .. 1, at each shift (TILE, TILE); 0 where the tile is flat."""
    scale = np.linalg.norm(tile) * np.sqrt(FIXED)
    return np.fft.irfft2(np.fft.rfft2(tile) * _alone(), tile.shape) / (scale or 1.0)


def _read(seen: _Seen) -> Found | None:
    """What is read where the pattern correlates best."""
    row, column = np.unravel_index(seen.likeness.argmax(), seen.likeness.shape)
    signs, roles = _pattern()
    turned = np.roll(seen.tile, (-row, -column), (0, 1))
    return _told(np.bincount(roles[roles >= 0], (signs * turned)[roles >= 0]))


def _told(heard: np.ndarray) -> Found | None:
    """The code whose check fits, of what was heard of each bit (CODE + CHECK,): as it is, or with some of the faintest turned."""
    bits = sum(1 << place for place in range(CODE + CHECK) if heard[place] > 0)
    faintest = [1 << int(place) for place in np.abs(heard).argsort()[:TURNED]]
    for turns in itertools.product((0, 1), repeat=TURNED):
        check, code = divmod(bits ^ sum(bit for bit, turn in zip(faintest, turns, strict=True) if turn), 1 << CODE)
        if check == check_of(code):
            return Found(Tiled.name, code)
    return None
