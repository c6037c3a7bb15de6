"""The mutants of one sample, each against its tests in a copy of the code; what was found is kept as it is found."""

from __future__ import annotations

import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil
from attrs import evolve
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult

from tests.mutants.cover import Covered, worktree
from tests.mutants.sample import sample

# The four rooms that decide something; infra serves them.
ROOMS = ("pipelines", "stages", "training", "unidiffuser")
LIMIT_SECONDS = 120
# As measured under coverage, beside others: half of the limit is left for a busy machine.
TESTS_SECONDS = 60.0
MARK = "MUTANTS_WORKER"


@dataclass(frozen=True)
class Copy:
    """A worktree whose files are altered, one at a time."""

    root: Path

    def command(self, tests: Iterable[str], scratch: str) -> str:
        """Runs tests on the code of this copy, until the first that fails."""
        environment = {"PYTHONPATH": str(self.root), "TMPDIR": scratch, MARK: self.root.name, "OMP_NUM_THREADS": "1"}
        settings = [f"{name}={value}" for name, value in environment.items()]
        pytest = [sys.executable, "-m", "pytest", "-x", "-rf", "--tb=no", "-p", "no:cacheprovider"]
        return shlex.join(["env", "-C", str(self.root), *settings, *pytest, *tests])

    def try_mutant(self, mutation: MutationSpec, tests: list[str]) -> WorkResult:
        """What the tests say of a mutant; those that take too long without a fault as well are fewer the next time."""
        while True:
            with Scratch(self.root.name) as scratch:
                mine = evolve(mutation, module_path=self.root / mutation.module_path)
                result = mutate_and_test([mine], self.command(tests, scratch), LIMIT_SECONDS)
            if result.output != "timeout" or self.passes(tests):
                return result
            tests = tests[: len(tests) // 2]
            if not tests:
                return WorkResult(WorkerOutcome.NO_TEST)

    def passes(self, tests: list[str]) -> bool:
        """Whether the tests pass on the code as it is, within the limit."""
        with Scratch(self.root.name) as scratch:
            try:
                command = shlex.split(self.command(tests, scratch))
                return subprocess.run(command, capture_output=True, timeout=LIMIT_SECONDS).returncode == 0
            except subprocess.TimeoutExpired:
                return False


class Scratch:
    """A temporary folder; at its end no process of this worker is left."""

    def __init__(self, worker: str) -> None:
        self.worker = worker

    def __enter__(self) -> str:
        # Short: sockets below it have names of at most 107 characters.
        self.folder = tempfile.mkdtemp(prefix="m-", dir="/tmp")
        return self.folder

    def __exit__(self, *error: object) -> None:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.worker:
                    process.kill()
            except psutil.Error:
                continue
        shutil.rmtree(self.folder, ignore_errors=True)


class Session:
    """A sample, and what was found of it, in cosmic-ray's own database.

    Args:
        folder: where the copies and the database lie.
        database: its name.
        commit: whose code is altered.
        tests_of: the commit whose tests run, where it is another.
    """

    def __init__(self, folder: Path, database: str, commit: str, tests_of: str | None = None) -> None:
        self.folder, self.commit, self.tests_of = folder, commit, tests_of
        self.path, self.root = folder / database, worktree(folder / "sampled", commit)
        self.sound: set[str] = set()

    def open(self) -> AbstractContextManager[WorkDB]:
        return use_db(str(self.path), WorkDB.Mode.create)

    def draw(self, count: int, seed: int) -> None:
        """The sample, once."""
        with self.open() as db:
            if db.num_work_items == 0:
                drawn = [
                    evolve(m, module_path=m.module_path.relative_to(self.root)) for m in sample(self.root, ROOMS, count, seed)
                ]
                db.add_work_items(WorkItem.single(uuid.uuid4().hex, mutation) for mutation in drawn)

    def tests(self, mutation: MutationSpec, covered: Covered) -> list[str]:
        """The tests that run what is altered: its own folder's first, quick ones first, until a minute is full."""
        source = (self.root / mutation.module_path).read_text(encoding="utf-8")
        found = covered.at(str(mutation.module_path), mutation.start_pos[0], mutation.end_pos[0], source)
        mirror = f"tests/{mutation.module_path.parent}/"
        return covered.within(sorted(found, key=lambda test: (not test.startswith(mirror), covered.seconds[test])), TESTS_SECONDS)

    def run(self, covered: Covered, workers: int) -> None:
        """Every mutant that has no result yet; until no test that killed one fails on the code as it is."""
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(workers):
            root = worktree(self.folder / f"altered-{number}", self.commit, self.tests_of)
            subprocess.run([sys.executable, "-m", "compileall", "-q", *ROOMS, "infra", "tests"], cwd=root, check=True)
            copies.put(Copy(root))
        while self.waiting():
            self._try(covered, copies)
            self._recheck(covered, copies)

    def waiting(self) -> list[WorkItem]:
        """The mutants that are to be tried."""
        with self.open() as db:
            again = [item for item, result in db.completed_work_items if result.worker_outcome == WorkerOutcome.SKIPPED]
            return [*db.pending_work_items, *again]

    def _try(self, covered: Covered, copies: queue.Queue[Copy]) -> None:

        def one(item: WorkItem) -> tuple[str, WorkResult]:
            tests = self.tests(item.mutations[0], covered)
            copy = copies.get()
            try:
                result = copy.try_mutant(item.mutations[0], tests) if tests else WorkResult(WorkerOutcome.NO_TEST)
            finally:
                copies.put(copy)
            return item.job_id, result

        with ThreadPoolExecutor(copies.qsize()) as pool, self.open() as db:
            waiting = [pool.submit(one, item) for item in self.waiting()]
            for done, future in enumerate(as_completed(waiting), start=1):
                job, result = future.result()
                db.set_result(job, result)
                print(f"{done}/{len(waiting)}", job, (result.test_outcome or result.worker_outcome).value, flush=True)

    def _recheck(self, covered: Covered, copies: queue.Queue[Copy]) -> None:
        """A test that fails without any fault as well has killed nothing: its mutants are tried again, without it."""
        copy = copies.get()
        with self.open() as db:
            killed = {item.job_id: killer(result) for item, result in db.completed_work_items}
            failing = {test for test in set(killed.values()) - self.sound if test and not copy.passes([test])}
            self.sound |= {test for test in killed.values() if test} - failing
            doubtful = [job for job, test in killed.items() if test in failing]
            db.set_multiple_results(doubtful, WorkResult(WorkerOutcome.SKIPPED))
        covered.forget(failing)
        print(f"{len(failing)} tests fail without a fault: {len(doubtful)} mutants are tried again", flush=True)
        copies.put(copy)


def killer(result: WorkResult) -> str | None:
    """The test that failed first; None for a mutant that lives, or on which the tests did not end."""
    if result.test_outcome != TestOutcome.KILLED:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", result.output or "", re.MULTILINE)
    return found[1] if found else None
