"""Python's search for reference cycles, while hundreds of thousands of objects come that stay."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# New objects, and collections of the generation before, after which Python looks for cycles again.
SELDOM = (50_000, 20, 100)

_turn = threading.Lock()
# What was set when each of those who are inside came; the first is what holds when all have left.
_found: list[tuple[int, int, int]] = []


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Python looks for cycles seldom: units, records and lists of files live to the end, and to go through all of them again and
    again takes a third of a driver's time, and half of the time that a list takes to be read. Threads may be inside together."""
    with _turn:
        _found.append(gc.get_threshold())
        gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        with _turn:
            usual = _found.pop()
            if not _found:
                gc.set_threshold(*usual)
