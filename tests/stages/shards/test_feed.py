"""Work ahead of who takes it: in order, bounded, and over when nobody takes any more."""

from __future__ import annotations

import threading
import time
from itertools import count, islice

import pytest

from stages.shards.feed import ahead


def test_what_is_ready_comes_in_order_from_several_threads():
    together = threading.Barrier(3, timeout=30)

    def work(number: int) -> int:
        together.wait()
        time.sleep(0.01 * (3 - number % 3))
        return number * number

    assert list(ahead(range(9), work, threads=3, room=6)) == [(number, number * number) for number in range(9)]
    assert list(ahead([], work, threads=3, room=6)) == []


def test_no_more_is_read_than_there_is_room_and_nothing_after_the_end():
    read = []

    def numbers():
        for number in count():
            read.append(number)
            yield number

    before = threading.active_count()
    pictures = ahead(numbers(), str, threads=2, room=4)
    assert [text for _, text in islice(pictures, 5)] == list("01234")
    time.sleep(0.1)
    assert 5 + 3 <= len(read) <= 5 + 4 + 1, "those that were taken, those that wait, and one in the hand"
    pictures.close()
    assert threading.active_count() == before


def test_failures_come_when_their_turn_does():
    def broken():
        yield from range(3)
        raise OSError("the disk")

    def work(number: int) -> int:
        return 1 // (number - 4)

    found = []
    with pytest.raises(OSError, match="the disk"):
        found.extend(number for number, _ in ahead(broken(), work, threads=2, room=2))
    with pytest.raises(ZeroDivisionError):
        found.extend(number for number, _ in ahead(range(9), work, threads=2, room=2))
    assert found == [0, 1, 2, 0, 1, 2, 3]
