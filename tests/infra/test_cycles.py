"""How often Python looks for cycles: seldom inside, and as it was once everybody has left."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from infra.cycles import SELDOM, seldom_collected
from infra.dataset import FILES_INLINE, FileEntry, Manifest, Stats, StoredFiles, commit, find
from infra.store import Store

USUAL = (701, 11, 12)


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*USUAL)
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize("first_out", [0, 1])
def test_of_two_that_overlap_the_last_one_out_leaves_it_as_the_first_one_found_it(first_out):
    both = [seldom_collected(), seldom_collected()]
    for each in both:
        each.__enter__()
        assert gc.get_threshold() == SELDOM
    both[first_out].__exit__(None, None, None)
    assert gc.get_threshold() == SELDOM
    both[1 - first_out].__exit__(None, None, None)
    assert gc.get_threshold() == USUAL


def test_a_failure_inside_leaves_it_as_it_was():
    with pytest.raises(KeyError), seldom_collected():
        raise KeyError
    assert gc.get_threshold() == USUAL


def test_a_long_list_of_files_is_read_so(tmp_path, monkeypatch):
    during, read = set(), StoredFiles.__iter__

    def seen(files: StoredFiles) -> Iterator[FileEntry]:
        for entry in read(files):
            during.add(gc.get_threshold())
            yield entry

    monkeypatch.setattr(StoredFiles, "__iter__", seen)
    store, count = Store(str(tmp_path)), FILES_INLINE + 1
    files = [FileEntry(f"toy/units/{n}/{n}.tar", 1, 1, f"{n:064}", str(n)) for n in range(count)]
    commit(
        store,
        Manifest(
            stage="toy", node="toy", fingerprint="f", generation=0, inputs={}, config={}, sources={}, code={}, columns={},
            stats=Stats(rows_in=count, rows_out=count), summary={}, seconds=0.0, created="", files=files,
        ),
    )  # fmt: skip
    found = find(store, "toy", "f")
    assert found is not None and found.manifest.files == files
    assert during == {SELDOM} and gc.get_threshold() == USUAL
