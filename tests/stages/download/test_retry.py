"""download with a parent: only what can heal is fetched again, the rest is kept to the byte, and everything adds up."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from infra.dataset import find, verify
from infra.store import Store
from pipelines.pages.lineage import ancestors, descendants
from stages.__main__ import run_node
from stages.runner.contract import StageError
from stages.runner.graph import plan
from stages.runner.recipe import load_recipe
from tests.stages.hostile_web import HOST, Handler, hostile_web
from tests.stages.pages import name_of, samples_of, table_of

NODE = frozenset({"web-download"})


@pytest.fixture
def web():
    with hostile_web() as place:
        yield place


@pytest.fixture
def recipe(tmp_path, web, in_process, monkeypatch):
    """Two shards: one in which something can heal, one in which nothing can."""
    monkeypatch.setattr("stages.__main__.connect_ray", lambda: None)
    for number, names in enumerate((["jpeg", "second-try", "status-503", "status-404", "png"], ["webp", "gif", "html"])):
        urls = [f"http://{HOST}/{name}" for name in names]
        table = {"URL": urls, "TEXT": [f"caption of {name}" for name in names], "similarity": [0.3] * len(names)}
        pq.write_table(pa.table(table), tmp_path / f"part-{number}.parquet")
    document = {
        "name": "retry",
        "subsets": {
            "web": {
                "select": {"metadata": ["part-*.parquet"]},
                "download": {"hosts": {HOST: web}, "retries": 0, "timeout": 2},
                "filter": {"clip_scores": False, "duplicate_tolerance": None},
            }
        },
    }
    (tmp_path / "retry.yaml").write_text(yaml.safe_dump(document))
    return load_recipe(tmp_path / "retry.yaml")


def make(recipe, store):
    run_node(recipe, "web-select", store)
    return run_node(recipe, "web-download", store)


def again(recipe, store):
    plan(recipe, store, retry=NODE)
    return run_node(recipe, "web-download", store)


def rows_of(dataset):
    return {name_of(row["url"]): row for row in table_of(dataset).to_pylist()}


def test_only_rows_that_can_heal_are_fetched_again_and_the_others_are_kept(recipe, tmp_path):
    store = Store(str(tmp_path / "store"))
    first = make(recipe, store)
    assert first.manifest.stats.dropped == {"http_503": 2, "http_404": 1, "not_an_image": 1}
    assert first.manifest.summary["can_heal"] == 2
    Handler.asked.clear()
    Handler.asked["second-try"] = 1
    second = again(recipe, store)
    assert dict(Handler.asked) == {"second-try": 2, "status-503": 1}

    stats = second.manifest.stats
    assert (stats.rows_in, stats.rows_out) == (8, 5) and stats.adds_up()
    assert stats.dropped == {"http_503": 1, "http_404": 1, "not_an_image": 1}
    summary = second.manifest.summary
    assert (summary["retried"], summary["healed"], summary["can_heal"]) == (2, 1, 1)
    before, after = rows_of(first), rows_of(second)
    assert after["second-try"]["status"] == "success" and after["second-try"]["width"] == 320
    assert {name: row for name, row in after.items() if name != "second-try"} == {
        n: r for n, r in before.items() if n != "second-try"
    }
    assert verify(second) == []
    old, new = ({name_of(sample.meta["url"]): sample for sample in samples_of(dataset)} for dataset in (first, second))
    assert new.keys() - old.keys() == {"second-try"} and all(new[name] == sample for name, sample in old.items())


def test_shards_in_which_nothing_can_heal_are_the_parents_own_files(recipe, tmp_path):
    store = Store(str(tmp_path / "store"))
    first = make(recipe, store)
    second = again(recipe, store)
    paths = {entry.name: entry.path for entry in first.files}
    shared = {entry.name for entry in second.files if entry.path == paths[entry.name]}
    assert {name.split("-")[1] for name in shared} == {"1"} and len(shared) == 2 and len(second.files) == 4


def test_a_web_that_was_well_all_along_gives_the_same_files(recipe, tmp_path):
    """What healed looks as if it had never failed."""
    store, well = Store(str(tmp_path / "store")), Store(str(tmp_path / "well"))
    make(recipe, store)
    Handler.asked["second-try"] = 1
    second = again(recipe, store)
    Handler.asked["second-try"] = 1
    never_failed = make(recipe, well)
    assert [entry.sha256 for entry in second.files] == [entry.sha256 for entry in never_failed.files]


def test_it_names_its_parent_and_what_follows_goes_on_from_it(recipe, tmp_path):
    store = Store(str(tmp_path / "store"))
    first = make(recipe, store)
    kept = run_node(recipe, "web-filter", store)
    Handler.asked["second-try"] = 1
    second = again(recipe, store)
    assert second.manifest.inputs["parent"] == first.manifest.reference()
    assert first.manifest.reference() in [branch.reference for branch in ancestors(store, second).branches]
    assert second.manifest.reference() in [branch.reference for branch in descendants(store, first).branches]

    planned = plan(recipe, store)
    assert planned["web-download"].state == "hit" and planned["web-download"].fingerprint == second.manifest.fingerprint
    assert planned["web-filter"].state == "stale" and planned["web-filter"].reasons == [
        "input rows (web-download) is another dataset"
    ]
    more = run_node(recipe, "web-filter", store)
    assert more.manifest.stats.rows_out == kept.manifest.stats.rows_out + 1
    assert find(store, "download", first.manifest.fingerprint) is not None, "the parent stays as it is"


def test_a_retry_that_was_cut_off_is_ended_by_the_next_run(recipe, tmp_path):
    store = Store(str(tmp_path / "store"))
    first = make(recipe, store)
    begun = plan(recipe, store, retry=NODE)["web-download"]
    assert begun.reasons == ["what failed is tried again (generation 1)"]
    second = run_node(recipe, "web-download", store)
    assert second.manifest.fingerprint == begun.fingerprint and second.manifest.inputs["parent"] == first.manifest.reference()


def test_a_retry_of_a_retry_goes_on_from_it_and_force_starts_afresh(recipe, tmp_path):
    store = Store(str(tmp_path / "store"))
    make(recipe, store)
    second = again(recipe, store)
    Handler.asked.clear()
    third = again(recipe, store)
    assert third.manifest.inputs["parent"] == second.manifest.reference() and third.manifest.generation == 2
    assert sum(Handler.asked.values()) == second.manifest.summary["can_heal"]
    Handler.asked.clear()
    plan(recipe, store, force=NODE)
    fresh = run_node(recipe, "web-download", store)
    assert "parent" not in fresh.manifest.inputs and sum(Handler.asked.values()) == 8


def test_without_its_parent_only_a_fresh_start_is_left(recipe, tmp_path):
    store = Store(str(tmp_path / "store"))
    first = make(recipe, store)
    plan(recipe, store, retry=NODE)
    Path(store.root, first.folder, "manifest.json").unlink()
    with pytest.raises(StageError, match="its input download/.* is not in .*; run with --force web-download"):
        run_node(recipe, "web-download", store)
