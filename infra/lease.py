"""A lease on a name in an object store: a small object that is put if none is there, renewed while its holder works, and free
for others when it has not been renewed for a minute.

It saves work and decides nothing: a holder that was cut off for longer may meet another one, and what both make is put in place
by a conditional PUT of its own.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from infra.store import Store

FOLDER = ".state/leases"
# Seconds: when a lease ends that is not renewed, how often it is renewed, and how often one who waits looks, at first and later.
EXPIRES = 60.0
RENEWED = 15.0
LOOKS = (0.2, 3.0)
# By how much the clocks of two machines may differ, in seconds. A lease that is older by them than this ends at once.
CLOCKS = 300.0


@contextmanager
def leased(store: Store, name: str) -> Iterator[None]:
    """Hold a name against every other process that works on this store; waits for it."""
    lease = _Lease(store, f"{FOLDER}/{hashlib.sha256(name.encode()).hexdigest()[:24]}")
    lease.take()
    renewing = threading.Thread(target=lease.renew, daemon=True)
    renewing.start()
    try:
        yield
    finally:
        lease.over.set()
        renewing.join()
        lease.release()


class _Lease:
    def __init__(self, store: Store, path: str) -> None:
        self.store, self.path, self.holder = store, path, uuid4().hex
        self.over = threading.Event()
        self.confirmed = 0.0

    def _told(self) -> bytes:
        return json.dumps({"holder": self.holder, "renewed": time.time()}).encode()

    def _found(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.store.read_json(self.path)
        return found

    def _is_mine(self) -> bool:
        return (self._found() or {}).get("holder") == self.holder

    def take(self) -> None:
        """Wait until nobody else has it. Whether another's has ended is told by how long it stays the same while one looks, so
        that no two clocks are compared."""
        seen: dict[str, Any] | None = None
        since, pause = 0.0, LOOKS[0]
        while not self.store.write(self.path, self._told(), once=True):
            found, now = self._found(), time.monotonic()
            if found is None:
                continue
            if found["holder"] == self.holder:
                # A PUT that was made again, for its answer was lost, found what it had put.
                break
            if found != seen:
                seen, since = found, now
            ended = now - since > EXPIRES or time.time() - found["renewed"] > EXPIRES + CLOCKS
            if ended and self._found() == seen:
                self.store.discard(self.path)
                continue
            time.sleep(pause)
            pause = min(pause * 1.5, LOOKS[1])
        self.confirmed = time.monotonic()

    def renew(self) -> None:
        while not self.over.wait(RENEWED):
            # A store that does not answer may the next time; a lease that ends meanwhile is another's.
            with suppress(Exception):
                if not self._is_mine():
                    return
                self.store.write(self.path, self._told())
                self.confirmed = time.monotonic()

    def release(self) -> None:
        # What is done is done, whether the store answers or not.
        with suppress(Exception):
            if time.monotonic() - self.confirmed < EXPIRES / 2 or self._is_mine():
                self.store.discard(self.path)
