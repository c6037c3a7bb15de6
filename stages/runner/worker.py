"""The process that does units of a phase, as a Ray actor or here: it builds the phase's worker once and runs units one by one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from socket import gethostname
from typing import Any

from infra.code import other_code
from infra.scratch import sweep
from infra.store import StoreError
from infra.store_access import check_seen
from stages.runner.contract import Bug, Job, Phase, StageError, Unit, UnitRecord, Worker, in_words, scratch_output
from unidiffuser.memory import out_of_memory

log = logging.getLogger("stages")


class PoolWorker:
    """Not built in the constructor: Ray takes an actor whose constructor raises for one that has died."""

    def __init__(self, job: Job, phase: Phase):
        logging.basicConfig(format="%(levelname)s %(message)s")
        log.setLevel(logging.INFO)
        self.job, self.phase = job, phase
        self.worker: Worker | None = None
        self.left_room: set[int] = set()
        self.changed = threading.Condition()

    def where(self) -> str:
        """The id of the Ray node that it is on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def prepare(self, code: str | None = None) -> None:
        """Build what runs the units; before that, clear away what dead workers left on this machine.

        Args:
            code: the digest of the driver's code.

        Raises:
            StageError: it cannot be built, or the code of this machine is another one.
        """
        if code is not None and (why := other_code(code, f"the machine {gethostname()}")) is not None:
            raise StageError(f"{self.job.node}: {why}")
        assert self.phase.worker is not None
        sweep()
        try:
            check_seen(self.job.store)
            with memory_said("its models", self.job, self.phase):
                self.worker = self.phase.worker(self.job)
        except StageError:
            raise
        except StoreError as error:
            raise StageError(f"{self.job.node}: {error}") from error
        except Exception as error:
            raise Bug(f"{self.job.node}: {in_words(error)}") from error

    def room(self, numbers: Collection[int]) -> None:
        """Wait until the units with these numbers leave room for another."""
        with self.changed:
            self.changed.wait_for(lambda: self.left_room.issuperset(numbers))

    def _leaves_room(self, number: int) -> None:
        with self.changed:
            self.left_room.add(number)
            self.changed.notify_all()

    def run(self, unit: Unit, key: str, number: int = 0) -> UnitRecord:
        """Do a unit, which `room` knows by its number."""
        if self.worker is None:
            self.prepare()
        assert self.worker is not None
        with ExitStack() as room:
            room.callback(self._leaves_room, number)
            return self._done(self.worker, unit, key, room.close)

    def _done(self, worker: Worker, unit: Unit, key: str, give_room: Callable[[], None]) -> UnitRecord:
        start = time.perf_counter()
        # Another run may be at the same unit: two that differ (the web changes) must not mix their files.
        with self.job.store.claimed(key), scratch_output(self.job.store) as out:
            out.give_room = give_room
            if (done := self.job.unit_done(key)) is not None:
                return done
            with memory_said(f"{self.phase.name} {unit.name}", self.job, self.phase):
                worker.run(unit, out)
            return out.publish(self.job, key, unit.name, time.perf_counter() - start)


def field_of(config: Any, names: Sequence[str]) -> str:
    """``batch (now 16)``: the fields to lower, with what they are."""
    return " or ".join(f"{name} (now {getattr(config, name)})" for name in names)


@contextmanager
def memory_said(what: str, job: Job, phase: Phase) -> Iterator[None]:
    """Puts memory that is not enough for `what` into a line.

    Raises:
        StageError: it was not.
    """
    try:
        yield
    except Exception as error:
        if (which := out_of_memory(error)) is None:
            raise
        fields = field_of(job.config, phase.memory)
        fix = f"lower {fields}" if fields else "take a machine with more"
        raise StageError(f"{job.node}: {which} is not enough for {what}; {fix}") from error
