"""What `gc` removes and what it keeps: against a rerun that must find all it had before, and files that must be gone."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.dataset import Dataset, find, point, verify
from infra.store import Store
from pipelines.command import app
from stages.catalog import stage_class
from stages.runner.garbage import collect, find_garbage
from stages.runner.graph import plan
from stages.runner.recipe import Recipe, load_recipe
from stages.runner.run import run_stage
from tests.pipelines.conftest import write_metadata

TOMORROW = datetime.now(UTC) + timedelta(hours=25)


@pytest.fixture
def folder(tmp_path: Path, in_process: None) -> Path:
    write_metadata(tmp_path / "metadata" / "part-0.parquet")
    write_metadata(tmp_path / "metadata" / "part-1.parquet", first=60)
    return tmp_path


def recipe(folder: Path, width: int, name: str = "kept") -> Recipe:
    path = folder / f"{name}-{width}.yaml"
    select = f"{{metadata: [metadata/*.parquet], min_width: {width}}}"
    path.write_text(f"name: {name}\nsubsets:\n  a: {{select: {select}}}\n")
    return load_recipe(path)


def run(recipe: Recipe, store: Store) -> Dataset:
    (node,) = plan(recipe, store).values()
    dataset = run_stage(node, store, stage_class("select"))
    point(store, recipe.name, node.name, dataset.manifest.reference())
    return dataset


def files(store: Store) -> dict[str, float]:
    """Every file of the units, with its time."""
    return {path: moment.timestamp() for path, _, moment in store.walk("select/units")}


def test_what_no_recipe_refers_to_goes_and_the_rest_is_reused_to_the_last_unit(folder: Path, store: Store) -> None:
    wanted = recipe(folder, 300)
    kept, _ = run(wanted, store), (only_kept := files(store))
    old = run(recipe(folder, 400), store)
    store.write_json(f"nodes/announced/select-{old.manifest.fingerprint}.json", {})
    unshared = {entry.path for entry in old.files} - {entry.path for entry in kept.files}
    assert unshared, "the two datasets share all their files: the test shows nothing"

    garbage = find_garbage([wanted], store, TOMORROW)
    assert [(d.manifest.fingerprint, size) for d, size in garbage.datasets] == [
        (old.manifest.fingerprint, garbage.datasets[0][1])
    ]
    assert garbage.bytes == sum(
        os.path.getsize(store.url(path)) for path in files(store) if path not in only_kept and not path.endswith("/")
    )
    assert set(files(store)) >= unshared, "it was only asked"
    collect(garbage, store)
    assert files(store) == only_kept
    assert find(store, "select", old.manifest.fingerprint) is None and verify(kept) == []
    assert not store.exists(f"nodes/announced/select-{old.manifest.fingerprint}.json")
    assert not find_garbage([wanted], store, TOMORROW).datasets

    # A file more: whatever was finished, of every phase, is not done again.
    write_metadata(folder / "metadata" / "part-2.parquet", first=120)
    run(wanted, store)
    assert only_kept.items() <= files(store).items()


def test_all_recipes_that_are_named_keep_their_datasets_and_those_that_are_not_are_said(folder: Path, store: Store) -> None:
    ours, theirs = recipe(folder, 300), recipe(folder, 400, "theirs")
    run(ours, store)
    other = run(theirs, store)
    both = find_garbage([ours, theirs], store, TOMORROW)
    assert not both.datasets and not both.leftovers and not both.strangers
    alone = find_garbage([ours], store, TOMORROW)
    assert [d.manifest.fingerprint for d, _ in alone.datasets] == [other.manifest.fingerprint]
    assert alone.strangers == ["theirs"]


def test_the_last_dataset_of_a_changed_node_stays_until_it_has_a_new_one(folder: Path, store: Store) -> None:
    old = run(recipe(folder, 300), store)
    assert not find_garbage([recipe(folder, 500)], store, TOMORROW).datasets
    run(recipe(folder, 500), store)
    assert [d.manifest.fingerprint for d, _ in find_garbage([recipe(folder, 500)], store, TOMORROW).datasets] == [
        old.manifest.fingerprint
    ]


def test_what_a_kept_dataset_was_made_from_stays(folder: Path, store: Store) -> None:
    before = run(recipe(folder, 300), store)
    wanted = recipe(folder, 500)
    after = run(wanted, store)
    manifest = after.manifest.model_copy(update={"inputs": {"rows": before.manifest.reference()}})
    store.write_json(f"{after.folder}/manifest.json", manifest.model_dump(mode="json", by_alias=True))
    assert not find_garbage([wanted], store, TOMORROW).datasets


def test_units_of_no_dataset_are_left_alone_for_a_day(folder: Path, store: Store) -> None:
    wanted = recipe(folder, 300)
    run(wanted, store)
    # Of a run that was killed: files without a record, and a finished unit of a configuration that nobody has any more.
    store.write("select/units/ab/abandoned/.00000.parquet.0.part", b"12345")
    store.write("select/units/cd/cdone/unit.json", b"{}")
    young = find_garbage([wanted], store)
    assert (young.young, young.bytes, young.leftovers) == (2, 0, [])
    later = find_garbage([wanted], store, TOMORROW)
    (left,) = later.leftovers
    assert (left.stage, len(left.folders), left.bytes, later.young) == ("select", 2, 7, 0)
    collect(later, store)
    assert not store.exists("select/units/ab/abandoned") and not store.exists("select/units/cd/cdone")


def test_an_unfinished_run_keeps_what_it_has(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(folder, 300)
    monkeypatch.setattr("stages.runner.run.commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(wanted, store)
    garbage = find_garbage([wanted], store, TOMORROW)
    assert files(store) and not garbage.leftovers and not garbage.datasets


def test_a_dataset_that_is_kept_stays_with_what_it_was_made_from(folder: Path, store: Store) -> None:
    before, other = run(recipe(folder, 500), store), run(recipe(folder, 400), store)
    wanted = recipe(folder, 300)
    run(wanted, store)
    inputs = {"rows": before.manifest.reference()}
    changed = other.manifest.model_copy(update={"inputs": inputs})
    store.write_json(f"{other.folder}/manifest.json", changed.model_dump(mode="json", by_alias=True))
    assert len(find_garbage([wanted], store, TOMORROW).datasets) == 2
    kept = find_garbage([wanted], store, TOMORROW, [Dataset(store, changed)])
    assert not kept.datasets
    alone = find_garbage([wanted], store, TOMORROW, [before])
    assert [d.manifest.fingerprint for d, _ in alone.datasets] == [other.manifest.fingerprint]
    collect(alone, store)
    assert verify(before) == []


def test_the_command_keeps_what_run_with_set_gave_and_what_is_named(folder: Path, store: Store) -> None:
    from typer.testing import CliRunner

    from stages.runner.recipe import RecipeError

    run(recipe(folder, 300), store)
    others = {width: run(recipe(folder, width), store).manifest.fingerprint for width in (400, 500)}
    # Another recipe, without such a field, does not stand in the way.
    (folder / "theirs.yaml").write_text("name: theirs\nsubsets:\n  b: {select: {metadata: [metadata/*.parquet]}}\n")
    set_400, named = ("--set", "subsets.a.select.min_width=400"), [str(folder / n) for n in ("kept-300.yaml", "theirs.yaml")]

    def doomed(*more: str) -> list[int]:
        done = CliRunner().invoke(app, ["gc", *named, "--store", store.root, *more])
        assert done.exit_code == 0, done.output
        return [width for width, fingerprint in others.items() if fingerprint in done.output]

    assert doomed() == [400, 500]
    assert doomed(*set_400) == [500]
    assert doomed("--keep", f"select/{others[500]}") == [400]
    assert doomed(*set_400, "--keep", others[500][:12]) == []
    failed = CliRunner().invoke(app, ["gc", *named, "--store", store.root, "--set", "subsets.a.select.wide=4"])
    assert isinstance(failed.exception, RecipeError)


def test_the_command_lists_first_and_removes_when_told_to(folder: Path, store: Store) -> None:
    from typer.testing import CliRunner

    def gc(*more: str) -> str:
        found = CliRunner().invoke(app, ["gc", str(folder / "kept-300.yaml"), "--store", store.root, *more])
        assert found.exit_code == 0, found.output
        return found.output

    run(recipe(folder, 300), store)
    assert gc() == "nothing to remove\n"
    old = run(recipe(folder, 400), store)
    listed = gc()
    assert f"a-select {old.manifest.fingerprint}" in listed and "would be removed; --delete removes it" in listed
    assert find(store, "select", old.manifest.fingerprint) is not None
    assert '"deleted": true' in gc("--delete", "--json")
    assert find(store, "select", old.manifest.fingerprint) is None
