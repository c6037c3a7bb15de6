"""SIGKILL at named points of a run, and the same run again: ``python -m tests.stages.killpoints FOLDER STORE``.

    before data                 a unit is done, and nothing of it is in the store
    between data and record     its files are, and no record says so
    in the record               a disk has a part of it; an object store has it, and nobody has heard that it was put
    in the manifest             the same of the manifest
    two commit, before          two runs are about to put the manifest, and one of them dies; the other one puts it
    two commit, after           one puts it and dies, then the other one wants to put its own

Says for each how the processes ended, how often units were run in all, and which files the dataset has.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from infra import lease
from infra.store import Store
from stages.runner import contract, pool
from stages.runner.run import run_stage
from stages.runner.worker import PoolWorker
from tests.stages.toy import Keep, Square, Squares, planned

ALONE = ("before data", "between data and record", "in the record", "in the manifest")
TOGETHER = ("two commit, before", "two commit, after")
RECORD, MANIFEST = "/unit.json", "/manifest.json"
# The unit of the first phase that is hit; the manifest is the first.
HIT = 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(number: int, what: Callable[[], None]) -> Callable[[], None]:
    """Do it the so-manieth time that this is called."""
    calls = []

    def count() -> None:
        calls.append(1)
        if len(calls) == number:
            what()

    return count


def before(owner: Any, name: str, what: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        what()
        return original(*arguments, **named)

    setattr(owner, name, wrapped)


def while_written(end: str, what: Callable[[Store], None]) -> None:
    """Do it when a file with such an end of its name is on its way: what `Store.write` does then is half done."""
    rename, write = Store._rename, Store.write

    def renaming(part: Path, target: Path, once: bool = False) -> bool:
        if str(target).endswith(end):
            what(Store(str(target.parent)))
        return rename(part, target, once)

    def writing(self: Store, path: str, data: bytes, once: bool = False) -> bool:
        written = write(self, path, data, once)
        if path.endswith(end) and not self.local:
            what(self)
        return written

    Store._rename, Store.write = staticmethod(renaming), writing  # type: ignore[assignment,method-assign]


def arm(point: str) -> None:
    if point == "before data":
        before(contract.Output, "publish", at(HIT, die))
    if point == "between data and record":
        before(contract, "write_record", at(HIT, die))
    if point == "in the record":
        count = at(HIT, die)
        while_written(RECORD, lambda store: count())
    if point == "in the manifest":
        while_written(MANIFEST, lambda store: die())


def arm_two(point: str, folder: Path, victim: bool) -> None:
    """Both wait until the other one is about to put its manifest."""
    write = Store.write

    def wait_for(name: str) -> None:
        while not (folder / name).exists():
            time.sleep(0.01)

    def writing(self: Store, path: str, data: bytes, once: bool = False) -> bool:
        if not path.endswith(MANIFEST):
            return write(self, path, data, once)
        (folder / f"victim-{victim}").touch()
        wait_for(f"victim-{not victim}")
        if victim and point.endswith("before"):
            die()
        if not victim and point.endswith("after"):
            wait_for("put")
        written = write(self, path, data, once)
        if victim:
            (folder / "put").touch()
            die()
        return written

    Store.write = writing  # type: ignore[method-assign]


def drive(root: str, log: Path) -> None:
    """The run itself, in this process and with the claims of units that workers have."""

    def in_process(job: Any, phase: Any, pending: Any, units: int, done: Any) -> None:
        worker = PoolWorker(job, phase)
        for unit, key in pending:
            done(unit, worker.run(unit, key))

    def tell() -> None:
        with log.open("a") as file:
            file.write(".")

    for worker in (Square, Keep):
        before(worker, "run", tell)
    pool.run_pool = in_process
    # What a dead holder left ends sooner.
    lease.EXPIRES, lease.RENEWED, lease.LOOKS = 0.5, 0.1, (0.05, 0.1)
    run_stage(planned(Squares), Store(root), Squares)


def child(root: str, log: Path, armed: Callable[[], None] = lambda: None) -> int:
    """Starts the run in a process of its own; gives its id."""
    process = os.fork()
    if process == 0:
        code = 1
        with suppress(BaseException):
            armed()
            drive(root, log)
            code = 0
        os._exit(code)
    return process


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder: Path, store: str) -> None:
    said: dict[str, Any] = {}
    for point in ("undisturbed", *ALONE, *TOGETHER):
        place = folder / point.replace(" ", "-")
        place.mkdir(parents=True)
        root, log = f"{store}/{place.name}", place / "log"
        codes = []
        if point in ALONE:
            codes = [ended(child(root, log, lambda point=point: arm(point)))]  # type: ignore[misc]
        if point in TOGETHER:
            both = [
                child(root, log, lambda point=point, place=place, victim=victim: arm_two(point, place, victim))  # type: ignore[misc]
                for victim in (True, False)
            ]
            codes = [ended(process) for process in both]
        codes.append(ended(child(root, log)))
        said[point] = {"codes": codes, "units": len(log.read_text()), "store": root}
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
