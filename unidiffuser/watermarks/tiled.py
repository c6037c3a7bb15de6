"""A mark that needs no weights: a spread spectrum in a tile that repeats, read without the original picture.

The published method is that of Kalker, Depovere, Haitsma and Maes, "A video watermarking system for broadcast monitoring"
(1999). The brightness of cells is moved by a few grey levels, up or down by a fixed pattern of 32 x 32 signs that repeats. A
quarter of the cells is the pattern alone: a detector finds its shift and scale by correlation. The others carry 32 bits of code
and 24 bits of the code's SHA-256, 13 or 14 cells a bit. A cell is 4 pixels of 256, and larger in larger pictures: JPEG keeps
it, and resizing moves it nowhere. Since the tile repeats, a part of a picture has all of it. A cell is moved only as far as the
picture itself does not have its sign already, and further where the picture is busy.

How often a clean picture is taken for a marked one: two tiles are read of a picture, as of a whole one and where the pattern
correlates best, each with its 8 faintest bits both ways, which is 512 readings. A reading counts if its last 24 bits are the
first of the SHA-256 of the 32 before them. Those of a clean picture, however regular it is, have nothing to do with SHA-256,
and fit with a probability of 2^-24. So at most 512 / 2^24 = 2^-15 of clean pictures are taken for marked: 1 in 32,768.

Why it is here, and no library's: `benchmarks.watermark` compares. Of invisible-watermark, dwtDct and dwtDctSvd do not outlive
JPEG 75 or a crop on pictures with plain areas; it has no false-positive rate, no release since 2023, and brings a second
OpenCV.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from PIL import Image

from unidiffuser.watermarks import CHECK, CODE, Found, check_of

# The faintest bits, which are tried both ways.
TURNED = 8
# Cells a side of the tile, those of the pattern alone, and cells along the shorter side of a picture.
TILE, FIXED, ACROSS = 32, 256, 64
# Pixels of a cell at least, and of the shorter side of a picture that has the whole tile then.
CELL, SMALLEST = 4, 128
# Grey levels by which a cell is to differ from its neighbours, and by which it is moved at most: of a share of their differences.
LEVEL, MOST, SHARE = 2.0, 8.0, 0.7
ROUNDS = 4
# More than so many grey levels are the picture's own.
HEARD = 1.3
# The cells that are looked for: from those of a whole picture to those of a part of half its width, each so much larger.
STEP, LARGEST = 1.01, 2.1


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
        grey = np.asarray(picture.convert("L").resize((across, down), Image.Resampling.BOX), np.float32)
        moved = Image.fromarray(_moved(grey, np.tile(tile, (-(-down // TILE), -(-across // TILE)))[:down, :across]))
        box = (0, 0, picture.width / cell, picture.height / cell)
        wave = np.asarray(moved.resize(picture.size, Image.Resampling.BICUBIC, box))
        pixels = np.asarray(picture, np.float32) + wave[:, :, None]
        return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))

    def find(self, picture: Image.Image) -> Found | None:
        """The mark of a picture that is whole, resized or compressed, or a part of half its width and height or more."""
        grey = picture.convert("L")
        side = min(grey.size)
        if side < TILE:
            return None
        sizes = side / ACROSS * STEP ** np.arange(np.log(LARGEST) / np.log(STEP))
        # Most pictures are whole, which takes no search.
        return _found(grey, sizes[:1], (0.0,)) or _found(grey, sizes, (0.0, 0.5))


def _found(grey: Image.Image, sizes: Iterable[float], shares: Sequence[float]) -> Found | None:
    """What is read where the pattern correlates best: of cells of these sizes in pixels, that begin at these shares of a cell."""
    places = ((size, x * size, y * size) for size in sizes for x in shares for y in shares)
    tile, likeness = max(((tile, _likeness(tile)) for tile in (_tile(grey, *place) for place in places)), key=_clearest)
    row, column = np.unravel_index(likeness.argmax(), likeness.shape)
    signs, roles = _pattern()
    turned = np.roll(tile, (-row, -column), (0, 1))
    return _read(np.bincount(roles[roles >= 0], (signs * turned)[roles >= 0]))


def _clearest(found: tuple[np.ndarray, np.ndarray]) -> float:
    return float(found[1].max())


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


def _moved(grey: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """By how many grey levels each cell is moved, (down, across), so that it differs from its neighbours by its sign."""
    most = np.clip(SHARE * _around(np.abs(grey - _around(grey))), LEVEL, MOST)
    moved = np.zeros_like(grey)
    for _ in range(ROUNDS):
        seen = grey + moved
        lacking = LEVEL - signs * (seen - _around(seen))
        moved = (signs * np.clip(signs * moved + lacking, 0, most)).astype(np.float32)
    return moved


def _around(cells: np.ndarray) -> np.ndarray:
    """The mean of the eight neighbours of each cell."""
    padded, (down, across) = np.pad(cells, 1, mode="edge"), cells.shape
    nine = sum(padded[y : y + down, x : x + across] for y in range(3) for x in range(3))
    return (nine - cells) / 8


def _tile(grey: Image.Image, cell: float, left: float, top: float) -> np.ndarray:
    """The tile (TILE, TILE) that repeats in a picture, if its cells have a size in pixels and begin there: their sum.

    Each counts with its difference from its neighbours, up to what a mark makes of it: beyond that it is an edge of the picture.
    """
    across, down = int((grey.width - left) / cell), int((grey.height - top) / cell)
    box = (left, top, left + across * cell, top + down * cell)
    cells = np.asarray(grey.resize((across, down), Image.Resampling.BOX, box), np.float32)
    whole = np.zeros((-(-down // TILE) * TILE, -(-across // TILE) * TILE))
    whole[:down, :across] = np.clip(cells - _around(cells), -HEARD, HEARD)
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


def _read(heard: np.ndarray) -> Found | None:
    """The code whose check fits, of what was heard of each bit (CODE + CHECK,): as it is, or with some of the faintest turned."""
    faintest = np.abs(heard).argsort()[:TURNED]
    for turns in itertools.product((1, -1), repeat=TURNED):
        bits = np.sign(heard)
        bits[faintest] *= turns
        code = sum(1 << place for place in range(CODE) if bits[place] > 0)
        if np.array_equal(bits, _bits(code)):
            return Found(Tiled.name, code)
    return None
