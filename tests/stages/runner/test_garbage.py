"""What `gc` removes and what it keeps: against a rerun that must find all it had before, and files that must be gone."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.dataset import Dataset, commit, find, point, verify
from infra.pins import pin, unpin
from infra.store import Store, StoreError
from pipelines.command import app
from stages.catalog import stage_class
from stages.runner import garbage as rules
from stages.runner.chain import unit_key
from stages.runner.contract import StageError
from stages.runner.garbage import Garbage, collect, find_garbage
from stages.runner.graph import plan
from stages.runner.recipe import Recipe, load_recipe
from stages.runner.run import run_stage
from tests.pipelines.conftest import write_metadata
from tests.stages.committed import trained

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


def fingerprint(dataset: Dataset) -> str:
    return dataset.manifest.fingerprint


def going(garbage: Garbage) -> list[str]:
    return [fingerprint(dataset) for dataset, _ in garbage.datasets]


def using(dataset: Dataset, before: Dataset, store: Store) -> Dataset:
    """The dataset, as if it had been made from another one."""
    manifest = dataset.manifest.model_copy(update={"inputs": {"rows": before.manifest.reference()}})
    store.write_json(f"{dataset.folder}/manifest.json", manifest.model_dump(mode="json", by_alias=True))
    return Dataset(store, manifest)


def made_from(before: Dataset, store: Store, stage: str, created: datetime | None = None) -> Dataset:
    """A dataset of a later stage, without files."""
    moment = created.isoformat() if created else before.manifest.created
    update = {"stage": stage, "node": f"{stage}-x", "fingerprint": f"{len(stage):x}" * 24, "files": [], "created": moment}
    return using(Dataset(store, before.manifest.model_copy(update=update)), before, store)


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


def test_whoever_reads_meanwhile_finds_a_whole_dataset_or_none(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(folder, 300)
    run(wanted, store)
    going = [run(recipe(folder, width), store) for width in (400, 500)]
    run(wanted, store)
    store.write("select/units/cd/cdone/unit.json", b"{}")
    garbage, remove, there = find_garbage([wanted], store, TOMORROW), Store.remove, []

    def watched(self: Store, path: str) -> None:
        remove(self, path)
        found = [dataset for each in going if (dataset := find(store, "select", fingerprint(each)))]
        there.append(len(found))
        assert [damage for dataset in found for damage in verify(dataset)] == [], f"after {path}"

    monkeypatch.setattr(Store, "remove", watched)
    collect(garbage, store)
    # Were the process to die in between, no dataset would be half of one.
    assert there[:2] == [1, 0] and not any(there[2:]) and len(there) > 4
    assert not any(store.exists(each.folder) for each in going) and not store.exists("select/units/cd/cdone")


def test_all_recipes_that_are_named_keep_their_datasets_and_those_of_others_go_only_if_asked_for(
    folder: Path, store: Store
) -> None:
    ours, theirs = recipe(folder, 300), recipe(folder, 400, "theirs")
    run(ours, store)
    other = run(theirs, store)
    both = find_garbage([ours, theirs], store, TOMORROW)
    assert not both.datasets and not both.leftovers and not both.strangers
    alone = find_garbage([ours], store, TOMORROW)
    assert not alone.datasets and alone.strangers == ["theirs"]
    assert [(each.recipe, fingerprint(each.dataset)) for each in alone.others] == [("theirs", fingerprint(other))]
    collect(alone, store)
    assert verify(other) == []
    asked = find_garbage([ours], store, TOMORROW, others=True)
    assert going(asked) == [fingerprint(other)] and not asked.others


def test_what_a_recipe_that_is_not_named_has_made_is_its_own_also_when_nothing_refers_to_it(folder: Path, store: Store) -> None:
    old, new = run(recipe(folder, 400, "theirs"), store), run(recipe(folder, 500, "theirs"), store)
    ours = recipe(folder, 300)
    before = run(recipe(folder, 350), store)
    run(ours, store)
    for dataset, name in ((old, "theirs"), (new, "theirs"), (before, "kept")):
        store.write_json(f"nodes/announced/select-{fingerprint(dataset)}.json", {"recipe": name})
    found = find_garbage([ours], store, TOMORROW)
    assert going(found) == [fingerprint(before)], "what our own recipe no longer refers to goes"
    assert sorted(fingerprint(each.dataset) for each in found.others) == sorted(map(fingerprint, (old, new)))
    # Somebody else's dataset needs it now.
    using(new, before, store)
    assert not going(find_garbage([ours], store, TOMORROW))
    # Who made it, nobody has written down: it may be theirs.
    store.remove(f"nodes/announced/select-{fingerprint(old)}.json")
    assert [each.recipe for each in find_garbage([ours], store, TOMORROW).others if each.dataset.folder == old.folder] == [None]


@pytest.mark.parametrize("stage", ["train", "export"])
def test_a_checkpoint_of_a_recipe_that_is_not_named_goes_only_if_it_is_named_itself(
    folder: Path, store: Store, stage: str
) -> None:
    ours, theirs = recipe(folder, 300), recipe(folder, 400, "theirs")
    run(ours, store)
    data = run(theirs, store)
    checkpoint = made_from(data, store, stage)
    point(store, "theirs", "train-x", checkpoint.manifest.reference())
    found = find_garbage([ours], store, TOMORROW, others=True)
    assert not going(found) and [fingerprint(each.dataset) for each in found.precious] == [fingerprint(checkpoint)]
    with pytest.raises(
        StageError, match=rf"^select/\w+: not removed: {stage}-x {fingerprint(checkpoint)[:12]}, which stays, was "
    ):
        find_garbage([ours], store, TOMORROW, remove=[data])
    assert going(find_garbage([ours], store, TOMORROW, remove=[checkpoint])) == [fingerprint(checkpoint)]
    named = find_garbage([ours], store, TOMORROW, remove=[checkpoint], others=True)
    assert sorted(going(named)) == sorted(map(fingerprint, (data, checkpoint)))
    with pytest.raises(StageError, match="not removed: a recipe that is named refers to it"):
        find_garbage([theirs], store, TOMORROW, remove=[data, checkpoint])


def test_a_dataset_younger_than_a_day_is_left_alone_with_what_it_was_made_from(folder: Path, store: Store) -> None:
    old = run(recipe(folder, 400), store)
    wanted = recipe(folder, 300)
    run(wanted, store)
    now = find_garbage([wanted], store)
    assert not now.datasets and now.young_datasets == 1
    assert going(find_garbage([wanted], store, remove=[old])) == [fingerprint(old)], "it was named"
    made_from(old, store, "filter", created=TOMORROW)
    later = find_garbage([wanted], store, TOMORROW)
    assert not later.datasets and later.young_datasets == 1


def test_what_is_pinned_stays_with_what_it_was_made_from_until_it_is_unpinned(folder: Path, store: Store) -> None:
    first = run(recipe(folder, 400), store)
    wanted = recipe(folder, 300)
    run(wanted, store)
    second = made_from(first, store, "filter")
    name = (second.manifest.stage, fingerprint(second))
    pin(store, *name)
    found = find_garbage([wanted], store, TOMORROW, others=True)
    assert not found.datasets and [fingerprint(dataset) for dataset in found.pinned] == [fingerprint(second)]
    with pytest.raises(StageError, match="not removed: it is pinned; `unidiffuser keep --remove` unpins it"):
        find_garbage([wanted], store, TOMORROW, remove=[second])
    assert unpin(store, *name) and not unpin(store, *name)
    assert sorted(going(find_garbage([wanted], store, TOMORROW))) == sorted(map(fingerprint, (first, second)))


def test_units_of_no_dataset_are_others_where_there_are_other_recipes(folder: Path, store: Store) -> None:
    wanted = recipe(folder, 300)
    run(wanted, store)
    run(recipe(folder, 400, "theirs"), store)
    for stage in ("select", "train"):
        store.write(f"{stage}/units/cd/cdone/unit.json", b"{}")
    found = find_garbage([wanted], store, TOMORROW)
    assert not found.leftovers and [left.stage for left in found.others_leftovers] == ["select", "train"]
    # A training that is not at its end yet has no dataset that could be named.
    asked = find_garbage([wanted], store, TOMORROW, others=True)
    assert [left.stage for left in asked.leftovers] == ["select"] and [left.stage for left in asked.others_leftovers] == ["train"]


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
    # The last file of a unit says how old it is.
    store.write("select/units/ef/eff/00000.parquet", b"1234567")
    store.write("select/units/ef/eff/.00001.parquet.0.part", b"")
    os.utime(store.url("select/units/ef/eff/00000.parquet"), (0, 0))
    young = find_garbage([wanted], store)
    assert (young.young, young.bytes, young.leftovers) == (3, 0, [])
    store.remove("select/units/ef/eff")
    later = find_garbage([wanted], store, TOMORROW)
    (left,) = later.leftovers
    assert (left.stage, len(left.folders), left.bytes, later.young) == ("select", 2, 7, 0)
    collect(later, store)
    assert not store.exists("select/units/ab/abandoned") and not store.exists("select/units/cd/cdone")


def test_a_download_whose_retry_has_begun_stays_whatever_its_node_gave_since(folder: Path, store: Store) -> None:
    selected = run(recipe(folder, 300), store)
    (folder / "web.yaml").write_text(
        "name: web\nsubsets:\n  a: {select: {metadata: [metadata/*.parquet], min_width: 300}, download: {}}\n"
    )
    web = load_recipe(folder / "web.yaml")
    first = plan(web, store)["a-download"]
    known = {"stage": "download", "node": first.name, "fingerprint": first.fingerprint, "inputs": first.inputs, "files": []}
    parent = commit(store, selected.manifest.model_copy(update=known))
    begun = plan(web, store, retry=frozenset({"a-download"}))["a-download"]
    assert begun.state != "hit" and begun.inputs["parent"] == parent.manifest.reference()
    # Of another configuration, which nobody wants any more.
    point(store, "web", "a-download", made_from(selected, store, "filter").manifest.reference())
    assert fingerprint(parent) not in going(find_garbage([web], store, TOMORROW, others=True))


def test_an_unfinished_run_keeps_what_it_has(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(folder, 300)
    monkeypatch.setattr("stages.runner.run.commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(wanted, store)
    garbage = find_garbage([wanted], store, TOMORROW)
    assert files(store) and not garbage.leftovers and not garbage.datasets


def test_the_newest_step_of_a_training_stays_when_its_recipe_has_changed_since(folder: Path, store: Store) -> None:
    """Also while the data of the changed recipe is not made, and nothing can be told of what a run would reuse."""

    def changed(lr: float) -> Recipe:
        path = folder / "trained.yaml"
        stages = "{select: {metadata: [metadata/*.parquet]}, download: {}, filter: {}, encode: {}}"
        training = f"{{data: [a], steps: 9, global_batch: 4, optimizer: {{lr: {lr}}}}}"
        path.write_text(f"name: trained\nsubsets:\n  a: {stages}\ntext-codec: {{captions: a}}\ntrain:\n  x: {training}\n")
        return load_recipe(path)

    key = trained(store, plan(changed(0.1), store)["train-x"], 3, 6)
    (left,) = find_garbage([changed(0.2)], store, TOMORROW).leftovers
    assert [path.rsplit("/", 1)[-1] for path in left.folders] == [unit_key(key, 3)]


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


def test_the_command_keeps_what_run_with_set_gave_and_what_is_named(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from stages.runner.recipe import RecipeError

    monkeypatch.setattr(rules, "GRACE", timedelta(0))
    run(recipe(folder, 300), store)
    others = {width: run(recipe(folder, width), store).manifest.fingerprint for width in (400, 500)}
    # Another recipe, without such a field, does not stand in the way.
    (folder / "theirs.yaml").write_text("name: theirs\nsubsets:\n  b: {select: {metadata: [metadata/*.parquet]}}\n")
    set_400, named = ("--set", "subsets.a.select.min_width=400"), [str(folder / n) for n in ("kept-300.yaml", "theirs.yaml")]

    def doomed(*more: str) -> list[int]:
        done = CliRunner().invoke(app, ["gc", *named, "--store", store.root, *more])
        assert done.exit_code == 0, done.output
        return [width for width, fingerprint in others.items() if fingerprint[:12] in done.output]

    assert doomed() == [400, 500]
    assert doomed(*set_400) == [500]
    assert doomed("--keep", f"select/{others[500]}") == [400]
    assert doomed(*set_400, "--keep", others[500][:12]) == []
    failed = CliRunner().invoke(app, ["gc", *named, "--store", store.root, "--set", "subsets.a.select.wide=4"])
    assert isinstance(failed.exception, RecipeError)


def test_the_command_lists_first_and_removes_when_told_to(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    def gc(*more: str) -> str:
        found = CliRunner().invoke(app, ["gc", str(folder / "kept-300.yaml"), "--store", store.root, *more])
        assert found.exit_code == 0, found.output
        return found.output

    run(recipe(folder, 300), store)
    assert gc() == "nothing to remove\n"
    old = run(recipe(folder, 400), store)
    young = gc("--delete")
    assert young.startswith("1 datasets that no recipe refers to are younger than a day") and "nothing to remove" in young
    monkeypatch.setattr(rules, "GRACE", timedelta(0))
    listed = gc()
    assert f"a-select {fingerprint(old)[:12]}" in listed and "would be removed; --delete removes it" in listed
    assert find(store, "select", fingerprint(old)) is not None
    assert '"deleted": true' in gc("--delete", "--json")
    assert find(store, "select", fingerprint(old)) is None


def test_the_command_refuses_while_nobody_has_said_what_becomes_of_others(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from pipelines.commands.checkpoints import Misuse
    from pipelines.commands.garbage import Wanted, gc

    monkeypatch.setattr(rules, "GRACE", timedelta(0))
    old, theirs = run(recipe(folder, 350), store), run(recipe(folder, 400, "theirs"), store)
    store.write_json(f"nodes/announced/select-{fingerprint(old)}.json", {"recipe": "kept"})
    run(recipe(folder, 300), store)
    pin(store, "select", fingerprint(run(recipe(folder, 320), store)))
    run(recipe(folder, 300), store)
    console = Console(width=80, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    wanted = Wanted([folder / "kept-300.yaml"], delete=True)

    with pytest.raises(Misuse, match=r"^nothing was removed: 1 datasets and .* \(theirs\); .*--others.*--no-others"):
        gc(wanted, store, console, None)
    listed = console.export_text()
    assert all(
        word in listed for word in ("theirs", "a-select", "pinned, and stays", fingerprint(theirs)[:12], fingerprint(old)[:12])
    )
    assert find(store, "select", fingerprint(old)) and find(store, "select", fingerprint(theirs))
    asked: list[str] = []
    gc(wanted, store, console, lambda question: bool(asked.append(question)))
    assert len(asked) == 1 and find(store, "select", fingerprint(old)) is None and find(store, "select", fingerprint(theirs))
    found = gc(replace(wanted, others=False), store, console, None)
    assert not found["datasets"] and [each["recipe"] for each in found["others"]] == ["theirs"]
    gc(wanted, store, console, lambda question: True)
    assert find(store, "select", fingerprint(theirs)) is None
    with pytest.raises(StoreError, match="there is no store"):
        gc(wanted, Store(str(folder / "none")), console, None)
    assert not (folder / "none").exists()
