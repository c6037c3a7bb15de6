"""How hosts are treated: few connections at a time, a pause where they ask for it, next to none when they are dead."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from stages.download.network import Wait

# Failures that say that nobody is there, rather than what somebody there thinks of a request.
SILENCE = frozenset({"timeout", "deadline", "connection", "dns"})
# Seconds after which one attempt finds out whether somebody is there again.
PROBE = 60.0
# Silent hosts that a worker remembers from one shard to the next, the latest ones; some 10 MB.
REMEMBERED = 10_000


class FetchError(Exception):
    """Why a fetch failed; its text is the reason and nothing else, since it becomes a column and a counter.

    `pause`: seconds that the host asks not to be disturbed, or None.
    """

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


class _Host:
    def __init__(self, connections: int):
        self.slots = threading.BoundedSemaphore(connections)
        self.silent = 0
        self.probe_at = 0.0
        self.not_before = 0.0
        self.asked = ""
        self.inside = 0


class Hosts:
    """What a worker knows of the hosts of its shards, and of those that were silent in the shards before.

    Args:
        connections: of one host at a time.
        failures: attempts that end in silence one after the other, whereupon the host is left alone but for an attempt a minute;
            0 means never.
    """

    def __init__(self, connections: int, failures: int):
        self.connections, self.failures = connections, failures
        self._hosts: dict[str, _Host] = {}
        self._lock = threading.Lock()

    def next_shard(self) -> None:
        """Another shard begins: keep what is in use, and the silent: hosts that hang would else cost their timeouts each time."""
        with self._lock:
            silent = [(name, host) for name, host in self._hosts.items() if host.silent and not host.inside]
            used = {name: host for name, host in self._hosts.items() if host.inside}
            self._hosts = used | dict(silent[-REMEMBERED:])

    def forgive(self) -> None:
        """No host is left alone any longer: their silence may have been this machine's own trouble."""
        with self._lock:
            for host in self._hosts.values():
                host.silent = 0

    @contextmanager
    def turn(self, name: str, wait: Wait) -> Iterator[None]:
        """One of the host's connections. Standing in line does not count against the URL's own deadline.

        Raises:
            FetchError: the host is left alone (`host_down`), asked for a longer pause than the URL has time (the status with
                which it did), or the shard's deadline came first (`shard_deadline`).
        """
        with self._lock:
            host = self._hosts.setdefault(name, _Host(self.connections))
            host.inside += 1
        try:
            with self._connection(host, wait):
                yield
        finally:
            with self._lock:
                host.inside -= 1

    @contextmanager
    def _connection(self, host: _Host, wait: Wait) -> Iterator[None]:
        arrived = time.monotonic()
        if not host.slots.acquire(timeout=min(max(0.0, wait.latest - arrived), threading.TIMEOUT_MAX)):
            raise FetchError("shard_deadline")
        try:
            wait.end = min(wait.end + time.monotonic() - arrived, wait.latest)
            self._admit(host, wait)
            try:
                yield
            except FetchError as error:
                self._heard(host, str(error) in SILENCE)
                if error.pause is not None:
                    self._postpone(host, time.monotonic() + error.pause, str(error))
                raise
            host.silent = 0
        finally:
            host.slots.release()

    def _postpone(self, host: _Host, moment: float, asked: str) -> None:
        """A host that has asked for a long pause is not disturbed sooner because another answer asks for a short one."""
        with self._lock:
            if moment > host.not_before:
                host.not_before, host.asked = moment, asked

    def _heard(self, host: _Host, nothing: bool) -> None:
        host.silent = host.silent + 1 if nothing else 0
        if host.silent == self.failures:
            host.probe_at = time.monotonic() + PROBE

    def _admit(self, host: _Host, wait: Wait) -> None:
        if self.failures and host.silent >= self.failures:
            with self._lock:
                if time.monotonic() < host.probe_at:
                    raise FetchError("host_down")
                host.probe_at = time.monotonic() + PROBE
        if (pause := host.not_before - time.monotonic()) > 0:
            if time.monotonic() + pause >= wait.end:
                raise FetchError(host.asked)
            time.sleep(pause)


def spread(urls: Sequence[str]) -> list[int]:
    """An order of the rows in which those of one host lie as far apart as they can, so that no host holds up the others."""
    hosts = [host_of(url) for url in urls]
    total, seen = Counter(hosts), Counter[str]()
    places = []
    for row, host in enumerate(hosts):
        places.append(((seen[host] + 0.5) / total[host], row))
        seen[host] += 1
    return [row for _, row in sorted(places)]


def host_of(url: str) -> str:
    """The host of a URL; empty where it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
