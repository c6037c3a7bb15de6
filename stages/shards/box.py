"""Work on strangers' bytes in child processes: a decoder that crashes or stalls there costs one picture.

The children are this process's own, as many as its threads ask for at a time, and serve until it ends. They load no more than
the work needs. The kernel's timers end a child that takes too long, even when nobody is left to watch it.
"""

from __future__ import annotations

import atexit
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, TypeVar, cast

from unidiffuser.images import PictureError

R = TypeVar("R")

# Of one picture. Seconds on a core decide, so that a busy machine drops no other rows than an idle one; 178 million pixels of a
# progressive JPEG take a few. Who waits for something else than the core never comes that far.
CPU_SECONDS = 10.0
CLOCK_SECONDS = 300.0
# Ends of a child that were not the picture's fault, as when memory ran out elsewhere, rarely come twice.
TRIES = 2
SERVE = "from stages.shards.box import serve; serve()"
# glibc gives what a picture took back to the kernel, which hands it out anew, page by page, for the next one: a quarter of the
# work on a photograph. A child keeps so many bytes instead, and gives back what comes in larger pieces, as of a huge picture.
KEPT_BYTES, LARGE_BYTES = 64 << 20, 32 << 20
MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES), "MALLOC_MMAP_THRESHOLD_": str(LARGE_BYTES)}


def boxed(work: Callable[[bytes], R], data: bytes) -> R:
    """What `work` makes of a picture's bytes, in a child process. Threads may call it at the same time.

    Args:
        work: picklable, like what it returns. Children keep it: it should compare equal from call to call.

    Raises:
        PictureError: `crashed`, the child died, of each picture again; `too_slow`, of more than `CPU_SECONDS`.
        Exception: what `work` raises.
    """
    told = pickle.dumps(work)
    for _ in range(TRIES):
        child = _idle.pop() if _idle else _Child()
        try:
            raised, value = child.ask(told, data)
        except (EOFError, OSError):
            if child.ended() in (-signal.SIGPROF, -signal.SIGALRM):
                raise PictureError("too_slow") from None
            continue
        except BaseException:  # its answer must not be taken for that to the next question
            child.kill()
            raise
        _idle.append(child)
        if raised:
            raise value
        return cast(R, value)
    raise PictureError("crashed")


class _Child:
    """One child process, and the pipe to it; it ends when the pipe does."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(os.path.abspath(place) for place in sys.path)
        with theirs:
            # A session of its own: Ctrl-C is meant for who waits for the child.
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(theirs.fileno()), str(CPU_SECONDS), str(CLOCK_SECONDS)],
                pass_fds=[theirs.fileno()], env={**MEMORY, **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.pipe = Connection(ours.detach())
        try:
            self.pipe.recv_bytes()
        except (EOFError, OSError):
            raise RuntimeError(f"a process that decodes pictures cannot start: {sys.executable} ended {self.ended()}") from None

    def ask(self, work: bytes, data: bytes) -> tuple[bool, Any]:
        """Whether it raised, and what. Raises EOFError or OSError when the child dies."""
        self.pipe.send_bytes(work)
        self.pipe.send_bytes(data)
        return cast(tuple[bool, Any], self.pipe.recv())

    def ended(self) -> int:
        self.pipe.close()
        return self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.ended()


_idle: list[_Child] = []


@atexit.register
def _end_children() -> None:
    while _idle:
        _idle.pop().ended()


# A fork has the pipes too, and would read the answers of its parent's children.
os.register_at_fork(after_in_child=_idle.clear)


def serve() -> None:
    """What a child does: answers through the pipe that its first argument names, until that is closed."""
    pipe = Connection(int(sys.argv[1]))
    cpu_seconds, clock_seconds = map(float, sys.argv[2:])
    timers = {signal.ITIMER_PROF: cpu_seconds, signal.ITIMER_REAL: clock_seconds}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Both may be blocked in the thread that started the child.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF, signal.SIGALRM})
    load = lru_cache(pickle.loads)
    pipe.send_bytes(b"ready")
    while True:
        try:
            told, data = pipe.recv_bytes(), pipe.recv_bytes()
        except EOFError:
            return
        try:
            work = load(told)
            for timer, seconds in timers.items():
                signal.setitimer(timer, seconds)
            answer = False, work(data)
        except Exception as error:
            answer = True, error
        for timer in timers:
            signal.setitimer(timer, 0)
        pipe.send(answer)
