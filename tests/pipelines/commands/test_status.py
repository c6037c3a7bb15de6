"""`unidiffuser status --watch` beside a run: what is done of a node that has no dataset yet, and the dataset when it has."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from infra.store import Store
from pipelines.commands.inspection import status_rows
from stages.catalog import stage_class
from stages.runner.graph import plan
from stages.runner.recipe import load_recipe
from stages.runner.run import run_stage
from tests.pipelines.conftest import start, write_metadata
from tests.stages import killed


def test_status_counts_the_units_of_an_unfinished_node_and_watching_shows_the_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(3):
        write_metadata(tmp_path / "metadata" / f"part-{part}.parquet", first=60 * part)
    path, store = tmp_path / "one.yaml", Store(str(tmp_path / "store"))
    path.write_text("name: one\nsubsets:\n  a: {select: {metadata: [metadata/*.parquet]}, download: {}}\n")
    recipe = load_recipe(path)
    node, stage = plan(recipe, store)["a-select"], stage_class("select")
    assert [row["done"] for row in status_rows(recipe, store)] == [None, None]

    asked: list[str] = []

    def stopped_at_the_third(job, phase, pending, units, done):
        for unit, key in pending:
            asked.append(phase.name)
            if len(asked) == 3:
                raise KeyboardInterrupt
            killed.in_process(job, phase, [(unit, key)], 1, done)

    monkeypatch.setattr("stages.runner.pool.run_pool", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_stage(node, store, stage)
    assert status_rows(recipe, store)[0]["done"] == {"phase": asked[0], "units": 2, "of": 3}

    watching = start("status", path, "--watch", "--store", store.root)
    watching.read_until(f"{asked[0]}: 2 of 3 units done; never made")
    monkeypatch.setattr("stages.runner.pool.run_pool", killed.in_process)
    run_stage(node, store, stage)
    assert watching.read_until(" hit ").startswith("a-select ")
    code, _ = watching.finish(signal.SIGINT)
    assert code == 130
