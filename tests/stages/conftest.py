"""Runs stages in the test process, or on one real local Ray that all tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.dataset import Dataset
from infra.store import Store
from stages.runner.contract import Stage
from stages.runner.run import run_stage
from tests.stages import killed
from tests.stages.planning import planned_of


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units run one after the other in this process; the rest of the runner is the real one."""
    monkeypatch.setattr("stages.runner.pool.run_pool", killed.in_process)
    # download installs an opener for its whole process, which is this one: it goes when the test ends.
    monkeypatch.setattr("urllib.request._opener", None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def make() -> Callable[..., Dataset]:
    """(stage, store, inputs, **config) -> the node's dataset, planned as `stages.runner.graph.plan` does."""

    def make(stage: type[Stage], store: Store, inputs: dict[str, Dataset] | None = None, **config: Any) -> Dataset:
        return run_stage(planned_of(stage, store, inputs or {}, config), store, stage)

    return make


@pytest.fixture
def digests() -> Callable[[Dataset], dict[str, str]]:
    """Dataset -> unit and name -> sha256 of every file."""
    return lambda dataset: {f"{entry.unit}/{entry.name}": entry.sha256 for entry in dataset.files}


@pytest.fixture
def unit_times() -> Callable[[Store, str], dict[str, int]]:
    """(store, stage) -> unit key -> modification time of its record: a unit that is done again gets another one."""

    def times(store: Store, stage: str) -> dict[str, int]:
        folder = Path(store.root, stage, "units")
        return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/*/unit.json")}

    return times
