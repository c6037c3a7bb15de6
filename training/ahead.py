"""The row groups that are worth holding in memory, read by several threads before they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor

from training.latents import RowGroup

READERS = 4


class RowGroups:
    """Holds what it is told to hold, and nothing else: what a window of the order needs is known, so nothing is guessed.

    Args:
        read: reads the row group of a number; threads call it at the same time.
    """

    def __init__(self, read: Callable[[int], RowGroup]) -> None:
        self._read = read
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="latents")
        self._held: dict[int, Future[RowGroup]] = {}

    def hold(self, numbers: Collection[int]) -> None:
        """Start to read these row groups if they are not here, and let go of all others."""
        kept = {number: self._held[number] for number in numbers if number in self._held}
        for number in self._held.keys() - kept.keys():
            self._held[number].cancel()
        self._held = kept
        for number in numbers:
            if number not in kept:
                kept[number] = self._threads.submit(self._read, number)

    def __getitem__(self, number: int) -> RowGroup:
        """A row group that is held; waits for it, and raises what reading it raised."""
        return self._held[number].result()
