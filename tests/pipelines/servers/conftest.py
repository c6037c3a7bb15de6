"""The machine that the tests of a file share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infra.processes import recorded
from tests.pipelines.conftest import start, survivors, write_metadata
from tests.pipelines.servers.machine import Machine


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    store = folder / "store"
    write_metadata(folder / "metadata" / "part-0.parquet")
    # Other rows: with the same ones, whoever comes second would have nothing to make.
    write_metadata(folder / "grown" / "part-0.parquet", first=600)
    try:
        code, printed = start("up", "--store", store).finish()
        assert code == 0, printed
        yield Machine(folder, store, str((prefect := recorded("prefect", store / ".state")) and prefect.address), printed)
    finally:
        start("down", "--store", store).finish()
        for process in survivors(store):
            process.kill()
