"""Datasets: the manifest is the commit, and `verify` finds what no longer matches it."""

import hashlib
import shutil
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infra import dataset as module
from infra.dataset import (
    Dataset,
    FileEntry,
    InputRef,
    Manifest,
    Stats,
    all_datasets,
    by_prefix,
    commit,
    find,
    point,
    pointed,
    verify,
)
from infra.room import DISK_RESERVE, NoRoom
from infra.store import Store, StoreError


def manifest(store: Store, files: int = 3, fingerprint: str = "f" * 24, **fields) -> Manifest:
    entries = []
    for number in range(files):
        data = f"content {number}".encode()
        path = f"select/units/aa/k{number}/{number}.bin"
        store.write(path, data)
        entries.append(FileEntry(path=path, rows=2, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), unit=f"k{number}"))
    values = dict(
        stage="select", node="a-select", fingerprint=fingerprint, generation=0, inputs={}, config={"x": 1}, sources={},
        code={"stage_version": 1}, columns={"url": "string"}, summary={}, seconds=1.0, created="2026-01-01T00:00:00+00:00",
        stats=Stats(rows_in=8, rows_out=6, dropped={"small": 2}), files=entries,
    )  # fmt: skip
    return Manifest(**{**values, **fields})


def test_commit_and_find(tmp_path):
    store = Store(str(tmp_path))
    assert find(store, "select", "f" * 24) is None
    written = manifest(store)
    commit(store, written)
    assert find(store, "select", "f" * 24).manifest == written
    assert [d.manifest.fingerprint for d in all_datasets(store)] == ["f" * 24]


def test_fetch_gives_a_folder_with_the_files_names(tmp_path):
    store = Store(str(tmp_path / "store"))
    dataset = commit(store, manifest(store))
    folder = dataset.fetch(tmp_path / "here")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {f"{n}.bin": f"content {n}".encode() for n in range(3)}


def test_many_files_move_beside_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILES_INLINE", 2)
    store = Store(str(tmp_path))
    written = manifest(store, files=3)
    commit(store, written)
    assert (tmp_path / "select" / ("f" * 24) / "files.parquet").exists()
    assert find(store, "select", "f" * 24).manifest == written


def test_rows_that_vanish_are_refused(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(ValueError, match="a-select: 1 of 9 rows are neither written nor counted"):
        commit(store, manifest(store, stats=Stats(rows_in=9, rows_out=6, dropped={"small": 2})))
    assert find(store, "select", "f" * 24) is None


def test_verify_reads_files_side_by_side(tmp_path, monkeypatch):
    store, together, opening = Store(str(tmp_path)), threading.Barrier(2), Dataset.open
    dataset = commit(store, manifest(store, files=4))
    damaged = Path(store.root, dataset.files[2].path)
    damaged.write_bytes(b"!" + damaged.read_bytes()[1:])

    def meeting(self, entry):
        together.wait(timeout=20)
        return opening(self, entry)

    monkeypatch.setattr(Dataset, "open", meeting)
    (problem,) = verify(dataset)
    assert problem.startswith(f"{damaged}: damaged (sha256 ")


def test_verify_names_damaged_and_missing_files(tmp_path):
    store = Store(str(tmp_path))
    dataset = commit(store, manifest(store))
    assert verify(dataset) == []
    damaged = Path(store.root, dataset.files[0].path)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    Path(store.root, dataset.files[2].path).unlink()
    problems = verify(dataset)
    assert len(problems) == 2
    assert "0.bin: damaged" in problems[0] and "2.bin: missing" in problems[1]


def test_by_prefix(tmp_path):
    store = Store(str(tmp_path))
    for fingerprint in ("abc1" * 6, "abd2" * 6):
        commit(store, manifest(store, fingerprint=fingerprint))
    assert by_prefix(store, "abc").manifest.fingerprint == "abc1" * 6
    assert by_prefix(store, f"{tmp_path}/select/{'abd2' * 6}/").manifest.fingerprint == "abd2" * 6
    with pytest.raises(StoreError, match="2 datasets match"):
        by_prefix(store, "ab")
    with pytest.raises(StoreError, match="no dataset"):
        by_prefix(store, "zz")


def test_pointers(tmp_path):
    store = Store(str(tmp_path))
    assert pointed(store, "recipe", "a-select") is None
    commit(store, manifest(store))
    point(store, "recipe", "a-select", InputRef(stage="select", fingerprint="f" * 24))
    assert pointed(store, "recipe", "a-select").manifest.node == "a-select"


def test_what_is_fetched_is_compared_with_its_record(tmp_path):
    store = Store(str(tmp_path / "store"))
    dataset = commit(store, manifest(store))
    assert (dataset.fetch(tmp_path / "good") / "1.bin").read_bytes() == b"content 1"
    store.write(dataset.files[1].path, b"kontent 1")
    where = dataset.url(dataset.files[1])
    with pytest.raises(StoreError, match=f"^{where}: damaged .sha256 .*; `unidiffuser verify` names what is damaged$"):
        dataset.fetch(tmp_path / "damaged")
    store.remove(dataset.files[1].path)
    with pytest.raises(StoreError, match=f"^{where}: no such file; `unidiffuser verify` names what is damaged$"):
        dataset.fetch(tmp_path / "gone")


@pytest.mark.parametrize("address", ["{}", "memory://{}"])
@pytest.mark.parametrize(
    "path", ["select/k1/../../x", "select/units/aa/k1//x", "/x", "../x", "select/units/aa/k1/", "select/units/aa/k1/@ab12/../x"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused_before_anything_is_fetched(tmp_path, address, path):
    """For every store: a local one is linked to, another is copied from."""
    store = Store(address.format(tmp_path / "store"))
    listed = manifest(store)
    listed.files[1].path = path
    here = tmp_path / "a" / "here"
    with pytest.raises(StoreError, match="^.*store: a record names a file '.*', which leads out of its folder; `unidiffuser"):
        commit(store, listed).fetch(here)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("other", ["", "/below"])
def test_a_name_in_the_place_of_another_file_is_refused(tmp_path, other):
    store = Store(str(tmp_path / "store"))
    listed = manifest(store)
    listed.files[1].path, listed.files[1].unit = f"{listed.files[0].path}{other}", "k0"
    with pytest.raises(StoreError, match="a record names '.*0.bin.*' in the place of another file"):
        commit(store, listed).fetch(tmp_path / "here")


def test_a_damaged_list_of_files_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILES_INLINE", 2)
    store = Store(str(tmp_path))
    folder = commit(store, manifest(store)).folder
    path = tmp_path / folder / "files.parquet"
    column = pq.read_metadata(path).row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=f"^{path}: damaged .*; delete {path.parent} and run again$"):
        find(store, "select", "f" * 24)


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_what_does_not_fit_the_machines_disk_is_not_fetched(tmp_path, monkeypatch, spare, fits):
    store = Store(f"memory://{tmp_path.name}")
    dataset = commit(store, manifest(store))
    usage = shutil.disk_usage(tmp_path)
    free = sum(entry.bytes for entry in dataset.files) + DISK_RESERVE + spare
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=free))
    if fits:
        assert len(list(dataset.fetch(tmp_path / "here").iterdir())) == 3
        return
    line = (
        f"^{dataset.url(dataset.files[0])}: 0.0 GiB are to be fetched to {tmp_path} of the machine .*, which has 0.5 GiB free; "
    )
    with pytest.raises(NoRoom, match=f"{line}free some there, or point TMPDIR elsewhere$"):
        dataset.fetch(tmp_path / "here")
    assert not (tmp_path / "here").exists()
