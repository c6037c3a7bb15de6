"""`python -m tests.mutants FOLDER --json FILE`: how many of a seeded sample of mutants the tests kill.

First all tests run once under coverage. Then every mutant meets the tests that run its line: its own folder's first, quick ones
first, as many as take a minute together. It is killed when one of them fails, or when they do not end within two minutes and
do without the fault. A test that killed one must pass on the code as it is. What is found lies in FOLDER, so that a run that
was cut goes on.

`--tests REV` meets the survivors with what the tests of a later commit have more.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

from tests.mutants.cover import Covered, collect
from tests.mutants.report import write_report
from tests.mutants.session import Session

# As `make test` runs them: those with servers of their own apart.
APART = ("tests/pipelines/servers/test_deploy.py", "tests/pipelines/test_chaos.py", "tests/pipelines/pages/test_browser.py")
GROUPS = [["tests/pipelines", *(f"--ignore={file}" for file in APART)], ["--ignore", "tests/pipelines"], list(APART)]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def first(folder: Path, count: int, seed: int, workers: int) -> Session:
    """The sample, of the commit that was checked out when the folder was new."""
    place = folder / "commit"
    if not place.exists():
        place.write_text(_git("rev-parse", "HEAD"))
    commit = place.read_text()
    collect(folder, GROUPS, commit)
    session = Session(folder, "before.sqlite", commit)
    session.draw(count, seed)
    session.run(Covered(folder), workers)
    return session


def later(folder: Path, before: Session, revision: str, workers: int) -> Session:
    """Those of `before` that survived, with the test files of a later commit that have changed."""
    tests_of = _git("rev-parse", revision)
    changed = _git("diff", "--name-only", "--diff-filter=AM", before.commit, tests_of, "--", "tests").splitlines()
    work = folder / tests_of[:12]
    work.mkdir(exist_ok=True)
    collect(work, [[name for name in changed if Path(name).name.startswith("test_")]], before.commit, tests_of)
    session = Session(work, "after.sqlite", before.commit, tests_of)
    if not session.path.exists():
        shutil.copy(before.path, session.path)
        with session.open() as db:
            alive = [item.job_id for item, result in db.completed_work_items if result.test_outcome != TestOutcome.KILLED]
            db.set_multiple_results(alive, WorkResult(WorkerOutcome.SKIPPED))
    session.run(Covered(work), workers)
    return session


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("folder", type=Path, help="working folder; a run goes on from what is in it")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tests", metavar="REV", help="a later commit, whose tests meet the survivors")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    before = first(folder, options.count, options.seed, options.workers)
    after = later(folder, before, options.tests, options.workers) if options.tests else before
    write_report(before, after, options.seed, options.json)


if __name__ == "__main__":
    main()
