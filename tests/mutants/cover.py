"""Runs all tests once under coverage, in a clean copy of the last commit; and answers which tests run a line."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.mutants.follow import FOLDER

ROOMS = ("pipelines", "stages", "training", "unidiffuser", "infra")
SETTINGS = """[run]
branch = False
parallel = True
sigterm = True
data_file = {folder}/coverage
plugins = tests.mutants.follow
source_pkgs = {rooms}
disable_warnings = no-data-collected,module-not-measured,module-not-imported,already-imported
"""


def worktree(folder: Path, commit: str, tests_of: str | None = None) -> Path:
    """A copy of a commit in `folder`, with the tests of another where asked: what runs there is not what a person is editing."""
    if not folder.exists():
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], check=True)
    # Also what a run that was cut has altered.
    subprocess.run(["git", "checkout", "--quiet", commit, "--", "."], cwd=folder, check=True)
    if tests_of is not None:
        subprocess.run(["git", "checkout", "--quiet", tests_of, "--", "tests"], cwd=folder, check=True)
    return folder


def collect(work: Path, groups: list[list[str]], commit: str, tests_of: str | None = None) -> None:
    """Runs each group of pytest's arguments as a process of its own, all at once; then what failed beside others again, alone.

    A group that was done is not run again.
    """
    running = {place: _start(work, place, arguments, commit, tests_of) for place, arguments in enumerate(groups)}
    for place, process in running.items():
        _finish(work, place, process)
    failed = [name for place in running for name, test in told(work / f"coverage-{place}")["tests"].items() if not test["passed"]]
    if failed:
        _finish(work, len(groups), _start(work, len(groups), failed, commit, tests_of))


def told(folder: Path) -> dict[str, Any]:
    """What `tests.mutants.tell` wrote of a run: `tests` and `fixtures` by name."""
    files = [json.loads(file.read_text()) for file in sorted(folder.glob("tests-*.json"))]
    return {kind: {name: value for file in files for name, value in file[kind].items()} for kind in ("tests", "fixtures")}


def _start(work: Path, place: int, arguments: list[str], commit: str, tests_of: str | None) -> subprocess.Popen | None:
    folder = work / f"coverage-{place}"
    if (folder / "done").exists():
        return None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "now").write_text("")
    (folder / "coveragerc").write_text(SETTINGS.format(folder=folder, rooms=",".join(ROOMS)))
    copy = worktree(work / f"watched-{place}", commit, tests_of)
    watched = [sys.executable, "-m", "coverage", "run", f"--rcfile={folder}/coveragerc"]
    command = [*watched, "-m", "pytest", "-p", "tests.mutants.tell", *arguments]
    environment = {**os.environ, FOLDER: str(folder), "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, cwd=copy, env=environment, stdout=log, stderr=log)


def _finish(work: Path, place: int, process: subprocess.Popen | None) -> None:
    if process is not None:
        folder = work / f"coverage-{place}"
        process.wait()
        subprocess.run(
            [sys.executable, "-m", "coverage", "combine", f"--rcfile={folder}/coveragerc", "-q"], cwd=folder, check=True
        )
        (folder / "done").touch()


class Covered:
    """Which tests run which line, and how long they take; of tests that passed.

    Args:
        work: what `collect` was given.
    """

    def __init__(self, work: Path) -> None:
        from coverage import CoverageData

        self.seconds: dict[str, float] = {}
        self.fixtures: dict[str, dict[str, float]] = {}
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for folder in sorted(work.glob("coverage-*")):
            copy = work / folder.name.replace("coverage", "watched")
            tests, fixtures = told(folder).values()
            passed = {name for name, test in tests.items() if test["passed"]}
            for name in passed:
                shared = {fixture: fixtures[fixture] for fixture in tests[name]["fixtures"] if fixture in fixtures}
                self.fixtures[name] = shared
                # A shared fixture is part of the time of the first test that uses it.
                longest = max(shared.values(), default=0.0)
                self.seconds[name] = tests[name]["seconds"] - (longest if tests[name]["seconds"] > longest else 0.0)
            users = defaultdict(set)
            for name in passed:
                for fixture in tests[name]["fixtures"]:
                    users[f"fixture:{fixture}"].add(name)
            data = CoverageData(str(folder / "coverage"))
            data.read()
            for file in data.measured_files():
                if not Path(file).is_relative_to(copy):
                    continue
                found = data.contexts_by_lineno(file)
                lines = self.lines[str(Path(file).relative_to(copy))]
                for line, contexts in found.items():
                    for context in contexts:
                        lines[line] |= users[context] if context.startswith("fixture:") else {context} & passed

    def at(self, file: str, start: int, end: int, source: str) -> set[str]:
        """The tests that run what stands in these lines. What runs at import counts for every test of the file's other lines."""
        lines = self.lines.get(file, {})
        statement = _innermost(ast.parse(source), start)
        if statement is None:
            return set().union(*lines.values()) if lines else set()
        direct = set().union(*(lines.get(line, set()) for line in range(start, end + 1)))
        return direct or set().union(*(lines.get(line, set()) for line in statement))

    def within(self, tests: list[str], seconds: float) -> list[str]:
        """As many of these tests as take so long together, with the fixtures that they share; one at least."""
        chosen, paid = [], set[str]()

        def cost(test: str) -> float:
            return self.seconds[test] + max((s for name, s in self.fixtures[test].items() if name not in paid), default=0.0)

        for test in tests:
            if (taken := cost(test)) <= seconds:
                seconds -= taken
                paid |= self.fixtures[test].keys()
                chosen.append(test)
        return chosen or sorted(tests, key=cost)[:1]

    def forget(self, tests: set[str]) -> None:
        """Never name these tests again."""
        for lines in self.lines.values():
            for line in lines:
                lines[line] -= tests


def _innermost(tree: ast.Module, line: int) -> range | None:
    """The lines of the smallest statement of a function's body that `line` belongs to; None where it runs at import."""
    found: ast.stmt | None = None
    inside = False
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside |= node.body[0].lineno <= line <= (node.end_lineno or 0)
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0):
            if found is None or node.lineno >= found.lineno:
                found = node
    if not inside or found is None:
        return None
    body = getattr(found, "body", None)
    return range(found.lineno, max(found.lineno + 1, body[0].lineno) if body else (found.end_lineno or 0) + 1)
