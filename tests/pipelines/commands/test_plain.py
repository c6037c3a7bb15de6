"""What needs no server: selection, log lines, lineage, pages, dry runs, and how errors are said."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from infra.dataset import Dataset, FileEntry, InputRef, Manifest, Stats, commit, folder_of
from infra.store import Store, sha256_of
from pipelines import command
from pipelines.commands.inspection import inspect_dataset, status_rows, status_view
from pipelines.commands.terminal import plan_table
from pipelines.flows.jobs import parse_line
from pipelines.flows.selection import select_nodes
from pipelines.pages.lineage import ancestors, descendants
from pipelines.pages.pictures import PICTURE_BYTES, data_uri, thumbnails
from stages.runner.recipe import Recipe, RecipeError, load_recipe
from stages.shards.tar import Sample, ShardWriter
from tests.pipelines.conftest import write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_recipe(tmp_path)
    document = tmp_path / "three.yaml"
    document.write_text(
        "name: three\n"
        "subsets:\n"
        "  a: {select: {metadata: [metadata/*.parquet]}, download: {}, filter: {}}\n"
        "  b: {from: a-download, filter: {min_side: 300}}\n"
    )
    return load_recipe(document)


@pytest.mark.parametrize(
    ("only", "start", "until", "expected"),
    [
        ((), None, None, ["a-select", "a-download", "a-filter", "b-filter"]),
        (("filter",), None, None, ["a-filter", "b-filter"]),
        (("a-select", "b-filter"), None, None, ["a-select", "b-filter"]),
        ((), "a-download", None, ["a-download", "a-filter", "b-filter"]),
        ((), None, "b-filter", ["a-select", "a-download", "b-filter"]),
        ((), "a-download", "a-filter", ["a-download", "a-filter"]),
    ],
)
def test_only_from_and_until_choose_along_the_edges(
    recipe: Recipe, only: tuple[str, ...], start: str | None, until: str | None, expected: list[str]
) -> None:
    assert select_nodes(recipe, only, start, until) == expected


def test_a_node_that_the_recipe_lacks_is_misuse(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="nothing: the recipe three has no such node; nearest are .*a-select"):
        select_nodes(recipe, ("nothing",))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("error: filter: no row is left", (logging.ERROR, "filter: no row is left")),
        ("WARNING again", (logging.WARNING, "again")),
        ("(PoolWorker pid=12, ip=127.0.0.2) ERROR stages: torn", (logging.ERROR, "stages: torn")),
        ("2026-11-23 00:45:00,123\tINFO worker.py:1 -- here", (logging.INFO, "worker.py:1 -- here")),
        ("INFORMATION without a level", (logging.INFO, "INFORMATION without a level")),
    ],
)
def test_a_line_keeps_its_level(line: str, expected: tuple[int, str]) -> None:
    assert parse_line(line) == expected


def a_dataset(store: Store, stage: str, fingerprint: str, inputs: dict[str, InputRef], *files: Path) -> Dataset:
    entries = []
    for file in files:
        path = f"{stage}/units/{fingerprint}/{file.name}"
        store.publish(file, path)
        entries.append(FileEntry(path=path, rows=1, bytes=file.stat().st_size, sha256=sha256_of(file), unit=fingerprint))
    manifest = Manifest(
        stage=stage, node=f"x-{stage}", fingerprint=fingerprint, generation=0, inputs=inputs, config={}, sources={},
        code={"stage_version": 1, "package": "0"}, columns={"url": "string"},
        stats=Stats(rows_in=3, rows_out=2, dropped={"small": 1}),
        summary={}, seconds=1.0, created="2026-01-01T00:00:00+00:00", files=entries,
    )  # fmt: skip
    return commit(store, manifest)


def test_lineage_goes_up_and_down(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = a_dataset(store, "select", "aa" * 12, {})
    second = a_dataset(store, "download", "bb" * 12, {"rows": first.manifest.reference()})
    third = a_dataset(store, "filter", "cc" * 12, {"rows": second.manifest.reference()})
    a_dataset(store, "filter", "dd" * 12, {"rows": second.manifest.reference()})
    up = ancestors(store, third)
    assert [up.branches[0].dataset, up.branches[0].branches[0].label.split()[0]] != [None, None]
    assert up.branches[0].branches[0].reference == first.manifest.reference()
    down = descendants(store, first)
    assert sorted(branch.reference.fingerprint[:2] for branch in down.branches[0].branches) == ["cc", "dd"]
    store.remove(folder_of("select", "aa" * 12))
    assert ancestors(store, third).branches[0].branches[0].label == f"select {'aa' * 6} (removed)"


def test_a_large_picture_is_shrunk_until_the_page_can_hold_it(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (1500, 1200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    store = Store(str(tmp_path / "store"))
    dataset = a_dataset(store, "evaluate", "ee" * 12, {}, tmp_path / "noise.png")
    uri = data_uri(dataset, dataset.files[0])
    assert (tmp_path / "noise.png").stat().st_size > 5_000_000
    assert len(uri) <= PICTURE_BYTES + 40
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
    assert picture.width / picture.height == pytest.approx(0.8, abs=0.01)


def test_the_page_of_images_shows_some_of_every_shard_with_captions_that_mean_nothing_to_markdown(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for number, captions in enumerate((["one | <b>two</b>", "x" * 200], ["three"])):
        with ShardWriter(tmp_path / f"{number}.tar") as shard:
            for key, caption in enumerate(captions):
                buffer = io.BytesIO()
                Image.new("RGB", (320, 160), (250 * number, 0, 10)).save(buffer, "PNG")
                shard.add(Sample(f"{key:05d}", buffer.getvalue(), "png", caption, {}))
    dataset = a_dataset(store, "filter", "ab" * 12, {}, tmp_path / "0.tar", tmp_path / "1.tar")
    title, table = thumbnails(dataset)
    pictures, _, captions = (line.strip("| ").split(" | ") for line in table.splitlines())
    assert title == "## Pictures" and captions == ["one &#124; &#60;b&#62;two&#60;/b&#62;", "x" * 79 + "…", "three"]
    opened = [Image.open(io.BytesIO(base64.b64decode(picture.split(",", 1)[1].rstrip(")")))) for picture in pictures]
    assert [picture.size for picture in opened] == [(160, 80)] * 3
    assert [round(picture.getpixel((80, 40))[0], -1) for picture in opened] == [0, 0, 250]  # type: ignore[index]

    Path(dataset.url(dataset.files[0])).write_bytes(b"cut")
    assert "three" in thumbnails(dataset)[1]
    assert thumbnails(a_dataset(store, "select", "aa" * 12, {})) == []


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["unidiffuser", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def test_what_scripts_read_is_json_and_whole(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "store"))
    (tmp_path / "good.txt").write_text("good")
    dataset = a_dataset(store, "filter", "ab" * 12, {}, tmp_path / "good.txt")

    def printed(*words: str, code: int = 0) -> Any:
        assert run_main(monkeypatch, *words, "--json", "--store", store.root) == code
        return json.loads(capsys.readouterr().out)

    whole = printed("inspect", "abab")
    assert whole.pop("where") == f"{store.root}/filter/units/{'ab' * 12}"
    assert whole == json.loads(store.read(f"{dataset.folder}/manifest.json"))
    told = {"node": "x-filter", "stage": "filter", "fingerprint": "ab" * 12, "files": 1}
    assert printed("verify", "abab") == {**told, "problems": []}
    Path(dataset.url(dataset.files[0])).write_text("bent")
    (problem,) = printed("verify", "abab", code=1)["problems"]
    assert "good.txt: damaged" in problem
    plan = printed("run", str(tmp_path / "three.yaml"), "--dry-run", "--force", "a-select")
    assert [(node["node"], node["state"]) for node in plan] == [(name, "miss") for name in recipe.nodes]
    assert plan[0]["reasons"] == ["never made", "forced"] and len(plan[0]["fingerprint"]) == 24


def test_the_version_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{version('unidiffuser')}\n"


def test_misuse_is_one_line_with_the_path_of_the_field_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, store = write_recipe(tmp_path), tmp_path / "store"
    code = run_main(monkeypatch, "run", recipe, "--store", store, "--set", "subsets.good.select.min_widht=3")
    assert code == 2
    assert capsys.readouterr().err == "error: subsets.good.select.min_widht: unknown field\n"
    assert run_main(monkeypatch, "run", tmp_path / "none.yaml", "--store", store) == 2
    assert "none.yaml: no such recipe file" in capsys.readouterr().err
    assert run_main(monkeypatch, "gc", tmp_path / "tyni.yaml", "--store", store) == 2
    assert capsys.readouterr().err.endswith("there is no store; --store or UNIDIFFUSER_STORE names another\n")
    assert run_main(monkeypatch, "status", tmp_path / "tyni.yaml", "--store", store) == 2
    assert capsys.readouterr().err.endswith("tyni.yaml: no such recipe file; nearest is tiny.yaml\n")
    assert not store.exists()


def test_a_missing_input_of_a_chosen_node_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, store = write_recipe(tmp_path), tmp_path / "store"
    assert run_main(monkeypatch, "run", recipe, "--only", "bad-download", "--store", store) == 1
    said = capsys.readouterr().err
    assert said == "error: bad-download: its input bad-select is not made (never made); run with --from bad-select\n"


def test_a_dry_run_says_why_and_begins_no_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, store = write_recipe(tmp_path), tmp_path / "store"
    run_main(monkeypatch, "run", recipe, "--dry-run", "--force", "bad-select", "--store", store)
    said = capsys.readouterr().out
    assert "never made; forced" in said and "input rows (bad-select) is forced" in said
    assert not (store / "nodes").exists()


def test_the_newest_kept_log_of_a_node_is_printed_and_what_has_none_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, store = write_recipe(tmp_path), tmp_path / "store"
    assert run_main(monkeypatch, "logs", recipe, "good-select", "--store", store) == 1
    assert capsys.readouterr().err.endswith("store: no such store; name the one of the run with --store\n") and not store.exists()
    folder = store / ".state" / "logs" / "tiny"
    folder.mkdir(parents=True)
    names = [f"good-select-{'a' * 24}-2", f"good-select-{'b' * 24}-1", f"other-good-select-{'c' * 24}-9"]
    for moment, name in enumerate(names):
        (folder / f"{name}.log").write_text(f"{name} ä\n")
        os.utime(folder / f"{name}.log", (moment, moment))
    run_main(monkeypatch, "logs", recipe, "good-select", "--store", store)
    assert capsys.readouterr().out == f"{names[1]} ä\n"
    assert run_main(monkeypatch, "logs", recipe, "bad-select", "--store", store) == 1
    assert capsys.readouterr().err.startswith("error: bad-select: no job was at it in ")
    assert run_main(monkeypatch, "logs", recipe, "select", "--store", store) == 2
    assert capsys.readouterr().err == "error: select: means good-select, bad-select; name one\n"
    assert run_main(monkeypatch, "logs", recipe, "god-select", "--store", store) == 2
    said = "error: god-select: the recipe tiny has no such node; nearest are good-select, bad-select, bad-download\n"
    assert capsys.readouterr().err == said


def test_verify_names_what_is_damaged_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "store"))
    for name in ("good.txt", "bent.txt", "gone.txt"):
        (tmp_path / name).write_text(name)
    dataset = a_dataset(store, "filter", "ab" * 12, {}, *(tmp_path / n for n in ("good.txt", "bent.txt", "gone.txt")))
    arguments = ("verify", "abab", "--store", tmp_path / "store")
    assert run_main(monkeypatch, *arguments) == 0
    Path(dataset.url(dataset.files[1])).write_text("bent")
    Path(dataset.url(dataset.files[2])).unlink()
    capsys.readouterr()
    assert run_main(monkeypatch, *arguments) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "bent.txt: damaged" in said[0] and "gone.txt: missing" in said[1]


def test_inspect_and_lineage_show_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "store"))
    first = a_dataset(store, "select", "aa" * 12, {})
    a_dataset(store, "download", "bb" * 12, {"rows": first.manifest.reference()})
    assert run_main(monkeypatch, "inspect", "select/aaaa", "--store", tmp_path / "store") == 0
    said = capsys.readouterr().out
    assert "3 in, 2 out" in said and "1 small" in said and "url" in said
    assert run_main(monkeypatch, "lineage", "aaaa", "--json", "--store", tmp_path / "store") == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["fingerprint"] == "aa" * 12 and tree["made"][0]["fingerprint"] == "bb" * 12
    for fingerprint, nothing in (("aaaa", "made from nothing"), ("bbbb", "used by nothing")):
        assert run_main(monkeypatch, "lineage", fingerprint, "--store", tmp_path / "store") == 0
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert [line for line in lines if line.endswith("nothing")] == [line for line in lines if line.endswith(nothing)] != []
        assert len([line for line in lines if line.endswith(("made from", "used by"))]) == 1


def test_inspect_says_in_a_line_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "store"))
    for number, name in enumerate(("rows.parquet", "images.tar")):
        (tmp_path / name).write_text("neither of them" * 100)
        dataset = a_dataset(store, "filter", f"a{number}" * 12, {}, tmp_path / name)
        assert run_main(monkeypatch, "inspect", f"filter/a{number}a{number}", "--store", tmp_path / "store") == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert dataset.url(dataset.files[0]) in said and said.endswith("`unidiffuser verify` names what is damaged")
    with ShardWriter(tmp_path / "images.tar") as tar:
        tar.add(Sample("k", b"no picture", "jpg", "a caption", {}))
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    inspect_dataset(a_dataset(store, "filter", "bb" * 12, {}, tmp_path / "images.tar"), console)
    said = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert said == "picture: images.tar: k.jpg cannot be shown (not_an_image)"


def test_tables_have_lines_on_a_terminal_and_are_plain_columns_elsewhere(recipe: Recipe, tmp_path: Path) -> None:
    def shown(terminal: bool) -> list[str]:
        console = Console(file=io.StringIO(), force_terminal=terminal, no_color=True, width=160)
        rows = status_rows(recipe, Store(str(tmp_path / "store")))
        console.print(status_view(recipe, rows), plan_table({}, []))
        return console.file.getvalue().splitlines()  # type: ignore[attr-defined]

    plain = shown(terminal=False)
    assert plain[0].split() == ["node", "state", "rows", "dataset", "made,", "or", "why", "not"]
    assert [line.split()[:2] for line in plain[1:5]] == [[name, "miss"] for name in recipe.nodes]
    assert all(line.isascii() for line in plain)
    assert "─" in shown(terminal=True)[1]


def test_the_shell_completes_commands_and_the_nodes_of_the_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)

    def offered(*words: str) -> list[str]:
        environment = {**os.environ, "_UNIDIFFUSER_COMPLETE": "complete_bash"}
        environment |= {"COMP_WORDS": " ".join(["unidiffuser", *words]), "COMP_CWORD": str(len(words))}
        command = Path(sys.executable).with_name("unidiffuser")
        return subprocess.run([command], env=environment, capture_output=True, text=True, timeout=60).stdout.split()

    assert {"retry-failed", "run"} == set(offered("r"))
    for option in ("--only", "--from", "--until", "--force"):
        assert offered("run", str(recipe), option, "b") == ["bad-select", "bad-download"]
    assert offered("run", str(tmp_path / "none.yaml"), "--only", "b") == []


def test_a_command_without_work_imports_no_more_than_it_reads_with(recipe: Recipe, tmp_path: Path) -> None:
    document, store = tmp_path / "three.yaml", tmp_path / "store"
    heavy = {"torch", "ray", "prefect", "aiohttp", "matplotlib", "httpx", "sqlalchemy"}
    a_dataset(Store(str(store)), "select", "aa" * 12, {})
    for words in (["status", str(document)], ["run", str(document), "--dry-run"], ["lineage", "aaaa"]):
        script = (
            "import sys; from pipelines.command import app\n"
            f"try: app([*{words!r}, '--store', {str(store)!r}])\n"
            f"finally: print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr.strip() == "[]", (words, done.stderr)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from pipelines.command import app\n"
        "try: app(['--help'])\n"
        "finally: print(sorted({'torch', 'ray', 'prefect', 'pyarrow', 'pydantic'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "demo" in done.stdout and done.stderr.strip() == "[]"
