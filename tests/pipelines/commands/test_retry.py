"""`unidiffuser retry-failed`: finds the recipe of a dataset, begins a generation where something can heal, runs one node."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from infra.dataset import Dataset, Stats, commit, find
from infra.store import Store
from pipelines import command
from pipelines.cli.options import console
from pipelines.commands import conduct, retry
from pipelines.commands.terminal import TerminalView
from pipelines.flows.run import Outcome, Result, Run, plan_run, snapshot
from pipelines.pages.artifacts import dataset_page
from pipelines.servers.servers import Servers
from stages.runner.graph import Planned
from stages.runner.recipe import Recipe, load_recipe
from tests.pipelines.commands.test_plain import a_dataset


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    pq.write_table(pa.table({"URL": ["http://x.example/1.png"], "TEXT": ["a"]}), tmp_path / "m.parquet")
    document = tmp_path / "web.yaml"
    document.write_text("name: web\nsubsets:\n  a: {select: {metadata: [m.parquet]}, download: {}}\n")
    return load_recipe(document)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What would have been run, as (fingerprint, nodes); the dataset is committed in its place."""
    asked: list[tuple[str, list[str]]] = []

    def run_recipe(recipe: Recipe, store: Store, wish: conduct.Wish, *_: Any) -> int:
        planned = plan_run(recipe, store)["a-download"]
        asked.append((planned.fingerprint, list(wish.only)))
        made(store, planned, healed=1)
        return 0

    monkeypatch.setattr(retry, "run_recipe", run_recipe)
    return asked


def made(store: Store, planned: Planned, can_heal: int = 1, **summary: int) -> Dataset:
    """A dataset of the node as the stage would have left it, but for its files."""
    manifest = a_dataset(store, planned.stage, planned.fingerprint, planned.inputs).manifest
    stats = Stats(rows_in=3, rows_out=2, dropped={"timeout": 1})
    return commit(store, manifest.model_copy(update={"stats": stats, "summary": {"can_heal": can_heal, **summary}}))


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["unidiffuser", "retry-failed", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def test_the_recipe_is_the_one_that_made_it(
    recipe: Recipe,
    store: Store,
    runs: list[tuple[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = made(store, plan_run(recipe, store)["a-download"])
    assert run_main(monkeypatch, first.manifest.fingerprint, "--store", store.root) == 2
    assert "makes download/" in (said := capsys.readouterr().err) and "name the one that does with --recipe" in said
    assert runs == []
    # A job leaves this behind; another recipe, whose files are gone, does not disturb.
    snapshot(recipe, store)
    store.write(
        ".state/recipes/gone-0.json", b'{"name": "gone", "subsets": {"a": {"select": {"metadata": ["/nowhere/*.parquet"]}}}}'
    )
    store.write(".state/recipes/old-0.json", b'{"name": "old", "steps": 3}')
    assert run_main(monkeypatch, first.manifest.fingerprint[:8], "--store", store.root) == 0
    ((fingerprint, nodes),) = runs
    assert nodes == ["a-download"] and fingerprint != first.manifest.fingerprint
    second = find(store, "download", fingerprint)
    assert second is not None and second.manifest.inputs["parent"] == first.manifest.reference()
    planned = plan_run(recipe, store)
    assert planned["a-download"].state == "hit"
    run = Run(recipe, store, planned, nodes, Servers(recipe.folder), TerminalView(console))
    page = dataset_page(run, planned["a-download"], Outcome("a-download", "made", 1.0, second))
    assert f"- parent: [a-download](/v2/artifacts/key/web-a-download) `download/{first.manifest.fingerprint}`" in page


def test_one_that_was_retried_names_its_newest_and_a_begun_retry_goes_on(
    recipe: Recipe,
    store: Store,
    runs: list[tuple[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = made(store, plan_run(recipe, store)["a-download"])
    chosen = ("--recipe", recipe.folder / "web.yaml", "--store", store.root)
    monkeypatch.setattr(retry, "run_recipe", lambda *_: 130)
    assert run_main(monkeypatch, first.manifest.fingerprint, *chosen) == 130
    begun = plan_run(recipe, store)["a-download"]
    assert begun.generation == 1 and begun.state != "hit"
    assert run_main(monkeypatch, first.manifest.fingerprint, *chosen) == 130
    assert plan_run(recipe, store)["a-download"].generation == 1, "what was begun goes on"
    second = made(store, begun)
    assert run_main(monkeypatch, first.manifest.fingerprint, *chosen) == 1
    assert f"has been retried already; its newest is download/{second.manifest.fingerprint}" in capsys.readouterr().err


def test_it_says_how_many_of_how_many_rows_have_healed_and_how_many_may_still(
    recipe: Recipe, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = made(store, plan_run(recipe, store)["a-download"], can_heal=3500)
    result: Result = "made"

    def run_recipe(recipe: Recipe, store: Store, wish: conduct.Wish, console: Console, after: Callable[[Run], None]) -> int:
        run = Run(recipe, store, plan_run(recipe, store), list(wish.only), Servers(recipe.folder), TerminalView(console))
        if result == "made":
            second = made(store, run.planned["a-download"], retried=3500, healed=1200, can_heal=2200)
            run.finish(Outcome("a-download", "made", 1.0, second))
        else:
            run.outcomes["a-download"] = Outcome("a-download", "failed")
        after(run)
        return 0

    monkeypatch.setattr(retry, "run_recipe", run_recipe)
    assert run_main(monkeypatch, first.manifest.fingerprint, "--recipe", recipe.folder / "web.yaml", "--store", store.root) == 0
    newest = plan_run(recipe, store)["a-download"].fingerprint
    said = "a-download: 1,200 of 3,500 rows healed, 2,200 may still; the next run of web goes on from "
    assert f"{said}{newest}\n" in capsys.readouterr().out and newest != first.manifest.fingerprint
    # What failed has healed nothing.
    result = "failed"
    assert run_main(monkeypatch, newest, "--recipe", recipe.folder / "web.yaml", "--store", store.root) == 0
    assert "healed" not in capsys.readouterr().out


def test_nothing_to_heal_and_no_download_are_said(
    recipe: Recipe,
    store: Store,
    runs: list[tuple[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = made(store, plan_run(recipe, store)["a-download"], can_heal=0)
    assert run_main(monkeypatch, whole.manifest.fingerprint, "--store", store.root) == 0
    assert "no row failed in a way that can heal" in capsys.readouterr().out
    other = a_dataset(store, "filter", "cc" * 12, {})
    assert run_main(monkeypatch, other.manifest.fingerprint, "--store", store.root) == 2
    assert "is a dataset of filter; expected one of download" in capsys.readouterr().err
    assert runs == [] and plan_run(recipe, store)["a-download"].generation == 0
