"""What the driver does to its workers where they run: asks for their stacks, reads what a dead one left, ends them.

Each is a small task on the worker's machine; a machine that does not answer in time gives nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from training.gang.signs import TELL_STACKS, Sign

# Seconds for a machine to start a process and answer, for a worker to write its stacks, and for py-spy to read them.
ANSWER, WRITE, SPY = 30.0, 3.0, 15.0
T = TypeVar("T")


def on_machines(act: Callable[[Sign], T], signs: Collection[Sign]) -> dict[int, T]:
    """What `act` gives for each sign on its machine, by rank; without those of machines that do not answer."""
    by_node: dict[str, list[Sign]] = defaultdict(list)
    for sign in signs:
        by_node[sign.node].append(sign)
    each: Any = ray.remote(num_cpus=0, max_retries=0)(_each)
    tasks = [
        each.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(act, of_node)
        for node, of_node in by_node.items()
    ]
    done, late = ray.wait(tasks, num_returns=len(tasks), timeout=ANSWER) if tasks else ([], [])
    found: dict[int, T] = {}
    for task in done:
        with suppress(RayError):
            found |= ray.get(task)
    for task in late:
        ray.cancel(task, force=True)
    return found


def _each(act: Callable[[Sign], T], signs: list[Sign]) -> dict[int, T]:
    return {sign.rank: act(sign) for sign in signs}


def _is_there(sign: Sign) -> bool:
    """Whether the process still is; its number may belong to another by now."""
    try:
        return b"ray::" in Path(f"/proc/{sign.pid}/cmdline").read_bytes()
    except OSError:
        return False


def stacks(sign: Sign) -> str:
    """The stacks of all threads of a worker: told by itself, or, where it does not answer, read by py-spy, if that may attach."""
    if not _is_there(sign):
        return "has ended"
    until = time.monotonic() + WRITE
    os.kill(sign.pid, TELL_STACKS)
    while time.monotonic() < until:
        time.sleep(0.2)
        if left(sign):
            # The threads are written one after the other.
            time.sleep(0.2)
            return left(sign)
    # It comes with Ray, and so lies beside Python.
    if (spy := shutil.which("py-spy", path=Path(sys.executable).parent)) is not None:
        with suppress(subprocess.TimeoutExpired):
            command = [spy, "dump", "--nonblocking", "--pid", str(sign.pid)]
            return subprocess.run(command, capture_output=True, text=True, timeout=SPY).stdout or "does not answer"
    return "does not answer"


def left(sign: Sign) -> str:
    """What a worker has written of its stacks so far."""
    try:
        return Path(sign.trace).read_text(errors="replace")
    except OSError:
        return ""


def last_words(sign: Sign) -> str:
    """What a worker that has ended has written of its stacks; the file goes."""
    told = left(sign)
    Path(sign.trace).unlink(missing_ok=True)
    return told


def end(sign: Sign) -> bool:
    """Kill a worker, whatever it is doing; gives whether it was still there."""
    was = _is_there(sign)
    if was:
        os.kill(sign.pid, signal.SIGKILL)
    Path(sign.trace).unlink(missing_ok=True)
    return was
