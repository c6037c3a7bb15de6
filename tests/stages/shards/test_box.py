"""Work in child processes: what it gives, and what a child's death costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest

from stages.shards import box
from stages.shards.box import boxed
from tests.stages.boxed import FATAL, SLOW, does, own_children, takes_memory, waits
from unidiffuser.images import PictureError, open_picture


def test_a_child_serves_picture_after_picture_and_threads_have_one_each():
    assert boxed(zlib.crc32, data := os.urandom(1_000_000)) == zlib.crc32(data)
    first = boxed(waits, b"0")
    assert first != os.getpid() and boxed(waits, b"0") == first
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(partial(boxed, waits), [b"0.3"] * 3))) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels count their pages otherwise")
def test_a_child_keeps_the_memory_of_a_picture_for_the_next(monkeypatch):
    with own_children(monkeypatch, seconds=60):
        pages = [boxed(takes_memory, b"") for _ in range(12)]
    # Each took 8 MB, which is 1,954 pages of 4 kB.
    assert pages[-1] - pages[1] < 1_954


def test_what_the_work_raises_is_raised_here():
    with pytest.raises(PictureError, match="^truncated$"):
        boxed(open_picture, b"\xff\xd8\xff")
    assert boxed(zlib.crc32, b"a") == zlib.crc32(b"a")


def test_a_child_that_dies_or_computes_for_too_long_costs_one_picture(monkeypatch):
    with own_children(monkeypatch, seconds=0.2):
        found = []
        for data in (b"ab", FATAL, b"cd", SLOW, b"ef"):
            try:
                found.append(boxed(does, data))
            except PictureError as reason:
                found.append(str(reason))
        assert found == [b"ba", "crashed", b"dc", "too_slow", b"fe"]
        # A machine that is busy with other things takes no picture's time.
        assert boxed(waits, b"0.5")


def test_a_child_that_something_else_kills_costs_nothing(monkeypatch):
    with own_children(monkeypatch, seconds=60):
        os.kill(boxed(waits, b"0"), signal.SIGKILL)
        assert boxed(does, b"ab") == b"ba"
        # The next picture is given to the child that is idle now. No other child of this process may die: one is Ray's.
        busy = psutil.Process(boxed(waits, b"0"))
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(boxed, waits, b"0.4")
            time.sleep(0.2)
            busy.kill()
            assert late.result() != busy.pid


def test_children_that_cannot_start_lose_no_picture(monkeypatch):
    with own_children(monkeypatch, seconds=60):
        monkeypatch.setattr(box, "SERVE", "raise SystemExit(7)")
        with pytest.raises(RuntimeError, match=r"cannot start: .* ended 7$"):
            boxed(does, b"ab")


def test_children_end_with_who_asked_them():
    script = "import os; from stages.shards.box import boxed; from tests.stages.boxed import waits; "
    script += "print(boxed(waits, b'0'), flush=True); os.kill(os.getpid(), 9)"
    child = int(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True).stdout)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
