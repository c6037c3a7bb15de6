"""The rows of the windows that training is in, in the order of the training, read by threads before they are asked for.

Training goes through a window from its first row to its last one, and the file has these rows in another order. So a row
group is spread over the window as soon as it is read, and what training has left behind is let go of piece by piece. When
the next window is read, little of the last one is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future

import numpy as np

from training.latents import LatentSpec, Parts, RowGroup
from training.mixture import Mixture, Windowed
from training.order import Ints
from training.threads import beside

# Threads that read: of this machine's disk, and of a store, which answers late but many at a time.
LOCAL_READERS, READERS = 2, 8
PIECE = 256


def empty_parts(spec: LatentSpec, rows: int) -> Parts:
    """Room for so many rows: each part (rows, *shape) and `data_type` (rows,)."""
    parts: Parts = {part: np.empty((rows, *shape), np.float16) for part, shape in spec.shapes.items()}
    parts["data_type"] = np.empty(rows, np.int64)
    return parts


class _Window:
    """Rows from `first` on, in pieces of `PIECE`; what lies before is None."""

    def __init__(self, spec: LatentSpec, rows: int, first: int) -> None:
        self.pieces: list[Parts | None] = [None] * (first // PIECE)
        self.pieces += [empty_parts(spec, PIECE) for _ in range(len(self.pieces), -(-rows // PIECE))]
        self.reads: list[Future[None]] = []
        self.first = first

    def forget(self, first: int) -> None:
        """Let go of the pieces before `first`."""
        self.pieces[: first // PIECE] = [None] * (first // PIECE)
        self.first = first

    def spread(self, group: RowGroup, rows: Ints, offsets: Ints) -> None:
        """Put training rows of a row group where the order has them, both (n,)."""
        numbers, within = np.divmod(offsets, PIECE)
        for number in np.unique(numbers):
            if (piece := self.pieces[number]) is not None:
                chosen = numbers == number
                for part, values in piece.items():
                    values[within[chosen]] = group.parts[part][group.train[rows[chosen]]]


class Windows:
    """Holds the windows that it is told to hold, and nothing else.

    Args:
        read: reads the row group of a number; threads call it at the same time.
        order: says which rows a window has.
        spec: shapes of a row.
        readers: threads that read.
    """

    def __init__(self, read: Callable[[int], RowGroup], order: Mixture, spec: LatentSpec, readers: int = LOCAL_READERS) -> None:
        self._read, self._order, self._spec = read, order, spec
        self._threads = beside(readers, "latents")
        self._held: dict[Windowed, _Window] = {}

    def hold(self, wanted: Mapping[Windowed, int]) -> None:
        """Have these windows here, or on their way, each from an offset on; let go of the rest."""
        for key in self._held.keys() - wanted.keys():
            for read in self._held.pop(key).reads:
                read.cancel()
        for key, first in wanted.items():
            if key in self._held and self._held[key].first <= first:
                self._held[key].forget(first)
            else:
                self._held[key] = self._start(key, first)

    def _start(self, key: Windowed, first: int) -> _Window:
        groups, rows = self._order.window(key)
        window = _Window(self._spec, len(groups), first)

        def read(number: int) -> None:
            offsets = np.flatnonzero(groups == number)
            window.spread(self._read(number), rows[offsets], offsets)

        window.reads += [self._threads.submit(read, int(number)) for number in np.unique(groups)]
        return window

    def gather(self, places: Ints) -> Parts:
        """The rows at places (n,) of the training, whose windows are held; waits for them, and raises what reading raised."""
        out = empty_parts(self._spec, len(places))
        codes, offsets = self._order.windows(places)
        for code in np.unique(codes).tolist():
            window = self._held[Windowed.of(code)]
            for read in window.reads:
                read.result()
            numbers = np.where(codes == code, offsets // PIECE, -1)
            for number in set(numbers.tolist()) - {-1}:
                piece, at = window.pieces[number], np.flatnonzero(numbers == number)
                assert piece is not None
                for part, values in out.items():
                    values[at] = piece[part][offsets[at] % PIECE]
        return out
