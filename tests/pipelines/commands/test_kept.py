"""`unidiffuser list` and `keep`, names that are not there, and commands that only read and make nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from infra import dataset as datasets
from infra.dataset import FILES_INLINE, FileEntry
from infra.store import Store
from pipelines.commands.kept import dataset_rows, dataset_table
from tests.pipelines.commands.test_plain import a_dataset, run_main
from tests.pipelines.conftest import write_recipe

WIDE = ("text-codec", "c1" * 12)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "store"))
    (tmp_path / "rows.txt").write_text("12345")
    a_dataset(store, "filter", "ab" * 12, {}, tmp_path / "rows.txt")
    a_dataset(store, "select", "aa" * 12, {})
    a_dataset(store, *WIDE, {}, tmp_path / "rows.txt")
    return store


def test_list_says_what_a_store_holds_in_the_order_of_the_stages(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "keep", "filter/abab", "--store", store.root) == 0
    assert run_main(monkeypatch, "list", "--json", "--store", store.root) == 0
    rows = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert [(row["stage"], row["bytes"], row["rows"], row["pinned"]) for row in rows] == [
        ("select", 0, 2, False), ("filter", 5, 2, True), ("text-codec", 5, 2, False),
    ]  # fmt: skip
    assert run_main(monkeypatch, "list", "--stage", "filter", "--store", store.root) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["x-filter", "filter", "ab" * 6, "2", "5", "bytes", "2026-01-01", "yes"]
    assert run_main(monkeypatch, "keep", "abab", "--remove", "--store", store.root) == 0
    assert "no longer pinned" in capsys.readouterr().out
    assert run_main(monkeypatch, "keep", "abab", "--remove", "--store", store.root) == 2
    assert "is not pinned" in capsys.readouterr().err
    assert not any(row["pinned"] for row in dataset_rows(store, None))


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_list_fits_the_terminal(store: Store, width: int) -> None:
    row = {
        "node": "laion-high-resolution-aesthetics-text-codec", "stage": "text-codec", "fingerprint": "ab" * 12,
        "rows": 170_000_000, "bytes": 123_400_000_000, "created": "2026-01-01T00:00:00+00:00", "pinned": True,
    }  # fmt: skip
    console = Console(width=width, force_terminal=True, no_color=True, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(dataset_table([row]))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)
    assert all(word in lines[1] for word in ("ab" * 6, "170,000,000", "123.4 GB", "2026-01-01", "yes"))


def test_a_long_list_of_files_is_not_read_to_say_how_large_a_dataset_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    small = datasets.find(store, "filter", "ab" * 12)
    assert small is not None
    files = [FileEntry(path=f"filter/units/cc/{n}", rows=1, bytes=3, sha256="", unit="cc") for n in range(FILES_INLINE + 1)]
    datasets.commit(store, small.manifest.model_copy(update={"fingerprint": "cc" * 12, "files": files}))
    store.remove(f"filter/{'cc' * 12}/files.parquet")
    assert [row["bytes"] for row in dataset_rows(store, "filter")] == [5, 3 * (FILES_INLINE + 1)]


def test_thousands_of_datasets_are_listed_in_a_second(store: Store) -> None:
    document = store.read(f"filter/{'ab' * 12}/manifest.json")
    for number in range(3000):
        folder = Path(store.root, "filter", f"{number:024x}")
        folder.mkdir()
        (folder / "manifest.json").write_bytes(document)
    start = time.process_time()
    assert len(dataset_rows(store, None)) == 3003
    assert time.process_time() - start < 1


def test_a_name_that_is_not_there_is_one_line_with_the_nearest(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(Path(store.root).parent)
    for command in (["lineage"], ["inspect"], ["verify"], ["keep"], ["keep", "--remove"]):
        assert run_main(monkeypatch, *command, "abac", "--store", store.root) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: abac: no dataset in ") and f"nearest are x-filter filter/{'ab' * 6}, " in said
    for option in ("--keep", "--remove"):
        assert run_main(monkeypatch, "gc", recipe, option, "text-codek", "--store", store.root) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert f"nearest are x-text-codec text-codec/{'c1' * 6}, " in said
    assert run_main(monkeypatch, "inspect", "a", "--store", store.root) == 2
    assert "2 datasets match" in capsys.readouterr().err
    assert run_main(monkeypatch, "list", "--stage", "filer", "--store", store.root) == 2
    assert capsys.readouterr().err == "error: filer: no such stage; nearest are filter, folder\n"
    assert not Path(store.root, "pins").exists() or not list(Path(store.root, "pins").iterdir())


def test_a_store_that_is_not_there_is_said_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, nowhere = write_recipe(tmp_path), tmp_path / "nowhere"
    recipe.write_text(recipe.read_text().partition("  bad:")[0])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for arguments in (["list"], ["lineage", "ab"], ["inspect", "ab"], ["verify", "ab"], ["gc", recipe], ["keep", "ab"]):
        for store, name in ((str(nowhere), str(nowhere)), ("memory://nowhere", "memory://nowhere")):
            assert run_main(monkeypatch, *arguments, "--store", store) == 2
            said = capsys.readouterr()
            assert said.err == f"error: {name}: there is no store; --store or UNIDIFFUSER_STORE names another\n" and not said.out
    for arguments in (["status", recipe], ["status", recipe, "--json"], ["run", recipe, "--dry-run"]):
        assert run_main(monkeypatch, *arguments, "--store", nowhere) == 0
        said = capsys.readouterr()
        assert said.err == f"{nowhere}: there is no store yet; a run makes it\n" and "never made" in said.out
    assert sorted(tmp_path.rglob("*")) == before
