"""The log of a Ray job as it grows: one connection as long as it holds, and no byte twice that need not be.

Ray tells a log from its start on every connection. One that breaks leaves another behind between Ray's own parts until the job
ends, and Ray has a hundred of these for all that its users ask. So a silence is waited out, and a log whose connections break
is connected to a few times only; then it is read as a whole when it has grown, which leaves nothing behind.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING

from infra.processes import NoAnswer, ServerError

if TYPE_CHECKING:
    from infra.ray_jobs import RayJobs

# How many connections one job's log may have.
CONNECTIONS = 3
# A log that has to be told from its start again is asked for the less often the longer it is.
LOG_BYTES_PER_SECOND = 500_000
# The longest time between two looks at a log without a connection; they begin with `tick`.
LONGEST_PAUSE = 60.0
# How long a connection is silent before the job's status is looked at: where a machine was lost, none says that the job ended.
SILENCE = 60.0
# How long a head that does not answer is waited for: another may come in its place, on a machine that is still to start.
AWAY = 600.0
# Networks forget a silent connection after some minutes; the kernel's probes, one a minute, keep it known. Ray answers no pings
# of WebSockets. The number is what macOS has for the same option.
KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", 0x10), 60),
)
# A connection that Ray does not close itself is an error to the library, which it would say with a traceback.
_QUIET = logging.getLogger(f"{__name__}.connection")
_QUIET.setLevel(logging.CRITICAL)


class FollowedLog:
    """One job's log, followed from its start to the job's end."""

    def __init__(self, jobs: RayJobs, job: str, tick: float):
        self.jobs = jobs
        self.job = job
        self.tick = tick
        self.heard = 0  # characters
        # Bytes of Ray's reply with the whole log, if the whole log is what has been heard.
        self.size = len(json.dumps({"logs": ""}))
        self.rest = ""
        self.warned_at = -1

    def follow(self) -> Iterator[str | ServerError | None]:
        """As `RayJobs.follow`."""
        pause = self.tick
        for connection in count():
            before = self.heard
            if connection < CONNECTIONS:
                yield from self._tail()
            if (yield from self._ended()):
                break
            if self.heard == before:
                yield from self._missing(patient=False)
            if (yield from self._wait(max(pause, self.heard / LOG_BYTES_PER_SECOND))):
                break
            pause = min(2 * pause, LONGEST_PAUSE)
        yield from self._missing(patient=True)
        if self.rest:
            yield self.rest

    def _tail(self) -> Iterator[str | ServerError | None]:
        """What one connection says, until it ends: when the job does, and sometimes long before, with the same farewell."""
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        url = f"{self.jobs.address.replace('http', 'ws', 1)}/api/jobs/{self.job}/logs/tail"
        with suppress(WebSocketException, OSError):
            # Ray's dashboard passes compression on to a part that does not handle it, and reads neither pings nor farewells.
            with connect(
                url,
                additional_headers=self.jobs.headers,
                max_size=None,
                proxy=None,
                compression=None,
                ping_interval=None,
                close_timeout=1,
                logger=_QUIET,
            ) as connection:
                for option in KEEP_ALIVE:
                    connection.socket.setsockopt(*option)
                position, last, ended = 0, time.monotonic(), False
                while True:
                    try:
                        chunk = str(connection.recv(timeout=self.tick))
                    except TimeoutError:
                        yield None
                        if time.monotonic() - last > SILENCE:
                            if ended:
                                return
                            ended = yield from self._ended()
                            last = time.monotonic()
                        continue
                    new = chunk[max(0, self.heard - position) :]
                    position, last = position + len(chunk), time.monotonic()
                    yield from self._take(new)

    def _take(self, new: str) -> list[str]:
        """The lines that end in what is new."""
        self.heard += len(new)
        self.size += len(json.dumps(new)) - len('""')
        *lines, self.rest = (self.rest + new).split("\n")
        return lines

    def _missing(self, patient: bool) -> Iterator[str | ServerError]:
        """What the whole log has beyond what was heard; it is not read when there is nothing."""
        if not self._grown():
            return
        try:
            whole = self.jobs.log(self.job, patient)
        except ServerError as error:
            if self.warned_at != self.heard:
                self.warned_at = self.heard
                yield ServerError(f"the log of the job {self.job} cannot be read: {error}")
            return
        yield from self._take(whole[self.heard :])

    def _grown(self) -> bool:
        """Whether the log has more than what was heard, as far as that can be told."""
        with suppress(ServerError):
            return self.jobs.log_size(self.job) != self.size
        return True

    def _wait(self, pause: float) -> Generator[ServerError | None, None, bool]:
        """Wait until the log has grown, looking every `pause` seconds; whether the job has ended first."""
        look = time.monotonic() + pause
        while not (yield from self._ended()):
            if time.monotonic() >= look:
                if self._grown():
                    return False
                look = time.monotonic() + pause
            yield None
            time.sleep(self.tick)
        return True

    def _ended(self) -> Generator[ServerError | None, None, bool]:
        """Whether the job has ended, which is asked for as long as a head may come that knows it."""
        until, told = time.monotonic() + AWAY, False
        while True:
            try:
                return self.jobs.ended(self.job)
            except NoAnswer as error:
                if time.monotonic() > until:
                    raise
                yield None if told else ServerError(f"{error}; waiting for another head")
                told = True
