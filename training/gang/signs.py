"""What a worker of a group tells of itself: a sign of life every second, whether it got SIGTERM, and its stack when it is asked.

It begins in the worker's main thread, which alone can take signals, before the process group is made. Training then runs in
another thread of the same process.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BEAT_SECONDS = 1.0
# Has the stacks of all threads written to the file that a sign names.
TELL_STACKS = signal.SIGUSR2


@dataclass(frozen=True)
class Sign:
    """A sign of life of one worker.

    Attributes:
        node: Ray's name of its machine, `host` the address.
        trace: file on that machine with its stacks: those that it was asked for, and that of a fatal signal.
        step: steps done, 0 before the first of this group.
        termed: whether it got SIGTERM.
    """

    rank: int
    node: str
    host: str
    pid: int
    trace: str
    step: int = 0
    termed: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on node {self.host} (pid {self.pid})"


class Signs:
    """The signs of this process."""

    def __init__(self) -> None:
        self.step, self.termed = 0, False
        self.trace: Path | None = None
        self.handle = -1

    def begin(self, board: Any) -> None:
        """Take SIGTERM and the question for stacks, and post signs from now on; only in the main thread of a Ray Train worker."""
        import ray
        from ray.train import get_context

        self.handle, path = tempfile.mkstemp(prefix="unidiffuser-stacks-")
        self.trace = Path(path)
        faulthandler.enable(self.handle)
        faulthandler.register(TELL_STACKS, self.handle, all_threads=True)
        signal.signal(signal.SIGTERM, self._term)
        node = ray.get_runtime_context().get_node_id()
        first = Sign(get_context().get_world_rank(), node, ray.util.get_node_ip_address(), os.getpid(), path)
        threading.Thread(target=self._beat, args=(board, first), name="signs", daemon=True).start()

    def broke_off(self, words: str) -> None:
        """Put where this worker was before the stacks that it is asked for, which no longer say it."""
        if self.handle >= 0:
            os.write(self.handle, words.encode())

    def end(self) -> None:
        """Remove the file: what comes now is the end of the process."""
        if self.trace is not None:
            self.trace.unlink(missing_ok=True)

    def _term(self, number: int, frame: object) -> None:
        self.termed = True

    def _beat(self, board: Any, first: Sign) -> None:
        never = threading.Event()
        while True:
            board.sign.remote(replace(first, step=self.step, termed=self.termed))
            never.wait(BEAT_SECONDS)


HERE = Signs()


def begin(board: Any) -> None:
    """Begin the signs of the worker that runs this."""
    HERE.begin(board)
