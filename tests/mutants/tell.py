"""A plugin of pytest: says what runs now, and writes down what each test took, which fixtures it uses and whether it passed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.follow import FOLDER


class Tests:
    """The name of a shared fixture that is being set up stands for all tests that use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tests: dict[str, dict[str, Any]] = {}
        self.fixtures: dict[str, float] = {}
        self.names: list[str] = [""]

    def say(self) -> None:
        from coverage import Coverage

        draft = self.folder / f"now-{os.getpid()}"
        draft.write_text(self.names[-1])
        draft.replace(self.folder / "now")
        if running := Coverage.current():
            running.switch_context(self.names[-1])

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.names.append(item.nodeid)
        self.say()
        self.tests[item.nodeid] = {"seconds": 0.0, "passed": True, "fixtures": list(getattr(item, "fixturenames", ()))}
        result = yield
        self.names.pop()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        self.names.append(f"fixture:{fixturedef.argname}")
        self.say()
        started = time.monotonic()
        try:
            return (yield)
        finally:
            self.fixtures[fixturedef.argname] = time.monotonic() - started
            self.names.pop()
            self.say()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests[report.nodeid]
        test["seconds"] += report.duration
        test["passed"] &= report.passed

    def pytest_sessionfinish(self) -> None:
        (self.folder / f"tests-{os.getpid()}.json").write_text(json.dumps({"tests": self.tests, "fixtures": self.fixtures}))


def pytest_configure(config: pytest.Config) -> None:
    folder = Path(os.environ[FOLDER])
    # Only processes that pytest starts follow it.
    os.environ["COVERAGE_PROCESS_START"] = str(folder / "coveragerc")
    config.pluginmanager.register(Tests(folder))
