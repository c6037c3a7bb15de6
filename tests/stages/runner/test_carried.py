"""What travels to a worker: nothing that grows with the files of a dataset or of a folder."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from infra.dataset import Dataset, FileEntry, Manifest, Stats, StoredFiles, commit, find
from infra.store import Store
from stages.folder.stage import Folder, FolderConfig
from stages.runner.actors import for_workers
from stages.runner.contract import Job, NodeConfig, Phase
from stages.runner.skipping import without_skipped

FEW, MANY = 10, 10_000
# What a pickled job or unit may take.
SMALL = 8_000


def committed(store: Store, files: int) -> Dataset:
    entries = [
        FileEntry(f"select/units/{n:02x}/{n:024x}/part-{n:05d}.parquet", n, 1000 + n, f"{n:064x}", f"{n:024x}")
        for n in range(files)
    ]
    rows = sum(entry.rows for entry in entries)
    manifest = Manifest(
        stage="select", node="a-select", fingerprint=f"many{files}", generation=0, inputs={}, config={}, sources={}, code={},
        schema={}, stats=Stats(rows, rows), summary={}, seconds=0.0, created="", files=entries,
    )  # fmt: skip
    return commit(store, manifest)


def job_of(store: Store, dataset: Dataset, **skip: list[str]) -> Job:
    class Config(NodeConfig):
        skip: tuple[str, ...] = ()

    return Job(store, "empty", "a-empty", Config(**skip), {"rows": dataset}, {}, {})


def test_a_workers_job_is_no_larger_where_there_are_more_files(store: Store) -> None:
    few, many = (pickle.dumps(replace(job_of(store, committed(store, count)), config=None)) for count in (FEW, MANY))
    assert max(len(few), len(many)) < SMALL
    files = pickle.loads(many).inputs["rows"].files
    expected = find(store, "select", f"many{MANY}").files
    assert isinstance(files, StoredFiles) and list(files) == expected and len(files) == MANY
    assert (files[0], files[-1], files[4999], files[3:5]) == (expected[0], expected[-1], expected[4999], expected[3:5])
    with pytest.raises(IndexError):
        files[MANY]
    assert len(pickle.dumps(pickle.loads(many))) < SMALL, "and it is passed on as small"


def test_a_workers_job_has_the_files_that_its_recipe_leaves_in(store: Store) -> None:
    dataset = committed(store, MANY)
    left = without_skipped(job_of(store, dataset, skip=["part-00007", "part-09999"])).inputs["rows"]
    names = [entry.name for entry in pickle.loads(pickle.dumps(left)).files]
    assert names == [entry.name for entry in left.files]
    assert len(names) == MANY - 2 and "part-00007.parquet" not in names


def test_a_folders_worker_gets_its_units_and_no_list_of_the_folder(store: Store) -> None:
    (pack,) = Folder.phases
    config, sizes = FolderConfig(images=["*.jpg"]), []
    for count in (FEW, MANY):
        sources = {f"/pictures/{n:06d}.{ending}": f"{n:064x}" for n in range(count) for ending in ("jpg", "txt")}
        job = Job(store, "folder", "a-folder", config, {}, sources, {})
        units = list(pack.plan(job, {}))
        assert sum(unit.rows for unit in units) == count
        sizes.append(len(pickle.dumps(for_workers(job, pack))))
        assert for_workers(job, replace(pack, takes_sources=True)).sources == sources
    assert max(sizes) < SMALL
    assert for_workers(job, Phase("other")).sources == sources, "a phase that says nothing gets all"
