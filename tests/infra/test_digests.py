"""Many files from outside: which of them are read, by whom, and that columns say what mappings say."""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from infra.dataset import Manifest, Stats, commit, find
from infra.external import resolve
from infra.hashed import hashed_apart
from infra.queries import file_name
from infra.sources import Sources, StoredSources, as_table, content_of, other
from infra.store import Store, StoreError
from infra.tree import BROKEN, FILE, FOLDER, SOME, Tree
from stages.runner.graph import outside_of, plan, read_outside
from stages.runner.recipe import parse_recipe

WATCHED: list[str] = []
OPENED: list[str] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if WATCHED and (event == "subprocess.Popen" or (event == "open" and str(args[0]).startswith(WATCHED[0]))):
        OPENED.append(str(args[0]))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store" / ".state").mkdir(parents=True)
    return Store(str(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(40):
        path = tmp_path / "pictures" / f"part {number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture %d" % number)
        path.with_suffix(".txt").write_bytes(b"caption %d" % number)
    return tmp_path / "pictures"


@pytest.fixture
def opened(folder: Path):
    """Files of the folder that this process opens, and processes that it starts, as Python itself tells."""
    if not hasattr(sys, "_watched_by_test"):
        sys.addaudithook(_hook)
        sys._watched_by_test = True
    WATCHED.append(str(folder))
    OPENED.clear()
    yield OPENED
    WATCHED.clear()


def truth(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_a_plan_of_an_unchanged_folder_opens_no_file(store: Store, folder: Path, opened: list[str]) -> None:
    recipe = parse_recipe({"name": "own", "subsets": {"own": {"folder": {"images": [f"{folder}/**/*.jpg"]}}}}, folder)
    first = plan(recipe, store)["own-folder"]
    assert len(opened) == 80
    opened.clear()
    again = plan(recipe, store)["own-folder"]
    assert opened == []
    assert dict(again.sources) == dict(first.sources) and again.fingerprint == first.fingerprint
    changed, new = folder / "part 1" / "7.txt", folder / "part 2" / "0a.jpg"
    changed.write_bytes(b"CAPTION 7")
    new.write_bytes(b"new")
    (folder / "part 0" / "3.jpg").unlink()
    opened.clear()
    found = plan(recipe, store)["own-folder"]
    assert sorted(opened) == sorted([str(changed), str(new)])
    WATCHED.clear()
    assert dict(found.sources) == truth(folder) and found.fingerprint != first.fingerprint


def test_another_pattern_knows_what_one_has_read(store: Store, folder: Path, opened: list[str]) -> None:
    resolve([f"{folder}/**/*.jpg"], store)
    opened.clear()
    found = resolve([f"{folder}/**/*", f"{folder}/**/1*.jpg"], store)
    assert len(opened) == 40 and all(name.endswith(".txt") for name in opened)
    WATCHED.clear()
    assert dict(found) == truth(folder)


def test_many_files_are_read_by_processes(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.digests.BYTES_HERE", 0)
    monkeypatch.setattr("infra.digests.BYTES_TOGETHER", 30 * 2**16)
    monkeypatch.setattr("infra.digests.hashed", None)
    assert dict(resolve([f"{folder}/**/*"], store)) == truth(folder)
    here, gone = str(folder / "part 0" / "3.jpg"), str(folder / "gone.jpg")
    assert hashed_apart([here]) == ([truth(folder)[here]], None)
    found, (number, error) = hashed_apart([here, gone])
    assert (found, number, type(error), error.filename) == ([], 1, FileNotFoundError, gone)


def test_a_damaged_memory_is_read_anew(store: Store, folder: Path) -> None:
    resolve([f"{folder}/**/*"], store)
    (memory,) = Path(store.root, ".state", "digests").iterdir()
    memory.write_bytes(memory.read_bytes()[:-100])
    assert dict(resolve([f"{folder}/**/*"], store)) == truth(folder)


def some(count: int, seed: int = 0, folders: int = 3) -> dict[str, str]:
    chance = random.Random(seed)
    return {f"/{chance.randrange(folders)}/{n}.jpg": hashlib.sha256(b"%d" % n).hexdigest() for n in range(count)}


def test_columns_say_what_a_mapping_says() -> None:
    plain = some(500)
    columns = Sources(as_table(plain))
    assert columns == plain and dict(columns) == plain and len(columns) == 500
    assert list(columns.items()) == sorted(plain.items()) and list(columns.values()) == [plain[name] for name in sorted(plain)]
    assert all(columns[name] == plain[name] for name in plain) and "/0/none.jpg" not in columns and "/9" not in columns
    weights = {"clip": "embedded-1"}
    assert Sources.of(columns, {}, weights) == plain | weights and Sources.of(columns, columns) == plain and Sources.of() == {}


def test_what_counts_is_names_and_contents_and_not_where_they_lie() -> None:
    plain = some(300)
    moved = some(300, seed=1)
    assert list(plain) != list(moved)
    assert content_of(plain) == content_of(moved) == content_of(Sources(as_table(plain)))
    name = next(iter(plain))
    others = ({**plain, name: "0" * 64}, {**plain, "/0/more.jpg": "0" * 64}, dict(list(plain.items())[1:]), {})
    assert len({content_of(each) for each in (plain, *others)}) == 5
    archive = {f"zip://in{name}::https://host/a.zip": digest for name, digest in plain.items()}
    assert content_of(archive) == content_of(plain)
    changed = {name: "0" * 64, "/1/more.jpg": "1" * 64, **dict(list(moved.items())[1:])}
    known = {(file_name(name), digest) for name, digest in plain.items()}
    named = ((file_name(name), digest) for name, digest in changed.items())
    assert other(changed, plain) == dict(pair for pair in named if pair not in known) != {}


def test_the_digest_of_sources_is_that_of_their_sorted_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.sources.SOME", 7)
    plain = {**some(30), "/1/ö 漢.jpg": "f" * 64}
    hashes = sorted(hashlib.sha256(f"{file_name(name)}\n{digest}".encode()).digest() for name, digest in plain.items())
    wanted = hashlib.sha256(b"".join(hashes)).hexdigest()[:24]
    in_text = as_table(plain).set_column(1, "digest", pa.array([plain[name] for name in sorted(plain)], pa.large_string()))
    for table in (as_table(plain), in_text, pa.concat_tables([as_table(plain)[:11], as_table(plain)[11:]])):
        assert content_of(Sources(table)) == wanted


def test_a_folder_is_looked_at_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "empty").mkdir()
    (folder / "none").symlink_to(folder / "missing")
    expected = {"none": (BROKEN, 0, 0, 0)}
    for path in folder.rglob("*"):
        status = path.lstat()
        stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns) if path.is_file() else (0, 0, 0)
        if not path.is_symlink():
            expected[str(path.relative_to(folder))] = (FOLDER if path.is_dir() else FILE, *stamp)
    # In the last case they fill all pieces and leave nothing over.
    for some, pieces in ((SOME, 1), (7, len(expected) // 7 + 1), (len(expected), 2)):
        monkeypatch.setattr("infra.tree.SOME", some)
        tree = Tree(f"{folder}/", None)
        rows = (row for part in tree.parts for row in zip(*part.to_pydict().values(), strict=True))
        assert {name: tuple(found) for name, *found in rows} == expected
        assert len(tree.parts) == pieces and max(map(len, tree.parts)) <= some


def test_many_sources_lie_beside_the_manifest(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.dataset.FILES_INLINE", 10)
    for count in (10, 11):
        sources = Sources.of(some(count - 1), {"clip": "embedded-1"})
        manifest = Manifest(
            stage="folder", node="a-folder", fingerprint=f"f{count}", generation=0, inputs={}, config={}, sources=sources,
            code={}, schema={}, stats=Stats(), summary={}, seconds=0.0, created="", files=[],
        )  # fmt: skip
        commit(store, manifest)
        found = find(store, "folder", f"f{count}")
        assert found is not None and found.manifest.sources == sources == {**some(count - 1), "clip": "embedded-1"}
        assert isinstance(found.manifest.sources, StoredSources) == (count > 10)
        assert found.manifest.model_dump(mode="json")["sources"] == dict(sources)
    path = Path(store.root, "folder", "f11", "sources.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    found = find(store, "folder", "f11")
    assert found is not None
    with pytest.raises(StoreError, match="sources.parquet: damaged"):
        dict(found.manifest.sources)


def test_what_a_plan_found_outside_is_a_file(store: Store, folder: Path) -> None:
    recipe = parse_recipe({"name": "own", "subsets": {"own": {"folder": {"images": [f"{folder}/**/*.jpg"]}}}}, folder)
    planned = plan(recipe, store)
    outside = read_outside(outside_of(planned))
    (folder / "part 0" / "later.jpg").write_bytes(b"later")
    assert plan(recipe, store, outside=outside)["own-folder"].fingerprint == planned["own-folder"].fingerprint
    assert plan(recipe, store)["own-folder"].fingerprint != planned["own-folder"].fingerprint
