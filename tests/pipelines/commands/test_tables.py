"""Every table that the command prints, on terminals of 80, 100 and 140 columns: within its width, and whole words."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from infra.dataset import Dataset, FileEntry, InputRef, Manifest, Stats, by_prefix, commit
from infra.store import Store
from pipelines.commands.brief import moment
from pipelines.commands.inspection import inspect_dataset, lineage_tree, show_paths, status_rows, status_view
from pipelines.commands.sampling import results_table
from pipelines.commands.terminal import Words, closing_table, funnel_table, plan_table
from pipelines.flows.run import Outcome, Run
from pipelines.pages.lineage import ancestors
from pipelines.servers.servers import Servers
from stages.filter.histogram import count, histogram_of
from stages.runner.graph import Planned, plan
from stages.runner.recipe import Recipe, load_recipe
from tests.pipelines.conftest import write_metadata

WIDTHS = (80, 100, 140)
FINGERPRINT = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
DROPPED = {
    "caption language is not among those asked for": 1_204_551_020,
    "clip_similarity": 310_442_117,
    "connection_refused_by_the_host": 99_431,
    "http_404": 41_003_554,
    "punsafe": 7,
}
REASONS = [
    "subsets.laion-high-resolution.filter.min_aesthetic: None -> 5.5",
    "input data.laion-high-resolution (laion-high-resolution-encode) is another dataset",
    "stage version 2 -> 3",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("tables")
    write_metadata(folder / "part-0.parquet")
    (folder / "wide.yaml").write_text(
        "name: paper-with-all-three-subsets\n"
        "subsets:\n"
        "  laion-high-resolution: {select: {metadata: [part-*.parquet]}, download: {}, filter: {}}\n"
        "  aesthetics: {from: laion-high-resolution-download, filter: {min_side: 512}}\n"
    )
    return load_recipe(folder / "wide.yaml")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("a-store-in-a-folder-with-a-long-name") / "runs"))


def a_dataset(store: Store, node: str, **more: Any) -> Dataset:
    stage, unit = node.rsplit("-", 1)[-1], FINGERPRINT[:24]
    rows_in = 2_323_456_789
    files = [
        FileEntry(f"{stage}/units/{unit}/{number:05d}.dat", 10_000, 3_123_456_789, FINGERPRINT, unit) for number in range(40)
    ]
    parts: dict[str, Any] = {
        "stage": stage, "node": node, "fingerprint": FINGERPRINT, "generation": 0, "sources": {},
        "inputs": {"rows": InputRef(stage="select", fingerprint=FINGERPRINT[::-1])},
        "config": {"min_aesthetic": 5.5, "langs": ["en"] * 90, "encoders": {"clip": "ViT-B-32/laion2b_s34b_b79k"}},
        "code": {"stage_version": 3, "package": "0.9.1", "git": FINGERPRINT[:40]},
        "columns": {"url": "string", "original_width": "int32", "embedding": "fixed_size_list<element: float>[512]"},
        "stats": Stats(rows_in, rows_in - sum(DROPPED.values()), DROPPED), "summary": {}, "seconds": 9.5,
        "created": "2026-11-28T10:40:14.123456+00:00", "files": files,
    }  # fmt: skip
    return commit(store, Manifest(**{**parts, **more}))


def shown(what: RenderableType, width: int, terminal: bool = True) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=terminal, no_color=True, width=width, legacy_windows=False)
    console.print(what)
    lines = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()  # type: ignore[attr-defined]
    assert all(cell_len(line) <= width for line in lines), "\n".join(lines)
    return lines


def column(lines: list[str], head: str) -> str:
    """What a column says, from its head to that of the next one, with one space where lines end."""
    title = next(line for line in lines if head in line)
    begin = title.index(head)
    after = re.search(r"\S", title[begin + len(head) :].lstrip(" ") and title[begin + len(head) :])
    end = begin + len(head) + after.start() if after else None
    below = lines[lines.index(title) + 2 :]
    return " ".join(part for line in below if (part := line[begin:end].strip()))


def words_of(text: str) -> set[str]:
    return {word for word in text.split() if len(word) <= 16}


@pytest.mark.parametrize("width", WIDTHS)
def test_a_plan_is_read_at_a_glance(recipe: Recipe, store: Store, width: int) -> None:
    planned = plan(recipe, store)
    stale = {name: Planned(**{**node.__dict__, "state": "stale", "reasons": REASONS}) for name, node in planned.items()}
    lines = shown(plan_table(stale, list(stale)), width)
    assert words_of(" ".join(REASONS)) <= set(column(lines, "because").replace(";", " ").split()) | {"3"}
    assert len(lines) < 2 + 4 * len(recipe.nodes) * 3
    assert all(node.fingerprint[:12] in "\n".join(lines) for node in stale.values())


@pytest.mark.parametrize("width", WIDTHS)
def test_status_is_a_screen(recipe: Recipe, store: Store, width: int) -> None:
    rows = status_rows(recipe, store)
    for row, state in zip(rows, ("hit", "stale", "stale", "miss"), strict=True):
        made = state == "hit"
        row |= {"state": state, "reasons": [] if made else REASONS, "fingerprint": FINGERPRINT}
        row |= {"created": "2026-11-28T10:40:14.123456+00:00" if made else None, "where": "/a/folder" if made else None}
        row |= {"rows_in": 2_323_456_789, "rows_out": 9, "dropped": DROPPED} if made else {}
    lines = shown(status_view(recipe, rows), width)
    assert len(lines) < 80 and FINGERPRINT[:12] in "\n".join(lines) and FINGERPRINT[:13] not in "\n".join(lines)
    assert moment("2026-11-28T10:40:14.123456+00:00") in " ".join(" ".join(lines).split())
    assert "/a/folder" not in "".join(lines)
    for text in (*REASONS, *DROPPED):
        for word in words_of(text):
            assert any(word in line for line in lines), (word, lines)
    console = Console(file=io.StringIO(), width=width)
    show_paths(rows, console)
    assert console.file.getvalue() == "laion-high-resolution-select: /a/folder\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_end_of_a_run_is_read_at_a_glance(recipe: Recipe, store: Store, tmp_path: Path, width: int) -> None:
    planned = plan(recipe, store)
    dataset = a_dataset(store, "laion-high-resolution-download")
    run = Run(recipe, store, planned, list(planned), Servers(tmp_path), None)  # type: ignore[arg-type]
    run.outcomes = {node: Outcome(node, "made", 86_400.5, dataset) for node in planned}
    lines = shown(closing_table(run), width)
    assert len(lines) == 3 + len(planned), "a line a node"
    assert all(re.search(rf"^{node} +made +\d[\d,]+ +86400.5 +[0-9a-f]{{12}}$", "\n".join(lines), re.M) for node in planned)
    lines = shown(funnel_table(recipe, dict.fromkeys(planned, dataset.manifest.stats)), width)
    assert all(any(word in line for line in lines) for reason in DROPPED for word in words_of(reason))


@pytest.mark.parametrize("width", WIDTHS)
def test_samples_and_lineage_fit(store: Store, width: int) -> None:
    dataset = a_dataset(store, "laion-high-resolution-download")
    caption = "a very long caption of a picture of the web, 日本語のキャプションもあります " * 3
    lines = shown(results_table([{"file": "00000.png", "prompt": caption, "caption": caption, "seed": 2**40}]), width)
    assert str(2**40) in "".join(lines) and any("picture" in line for line in lines)
    (line,) = shown(lineage_tree("made from", ancestors(store, dataset)), width)[:1]
    assert line.startswith(f"laion-high-resolution-download {FINGERPRINT[:12]}")


@pytest.mark.parametrize("width", WIDTHS)
def test_inspect_fits_and_its_histogram_counts_every_row(store: Store, width: int) -> None:
    values = np.random.default_rng(0).normal(0.3, 0.05, 5000).clip(0.11, 0.49)
    told = histogram_of("clip_similarity", count("clip_similarity", pa.chunked_array([pa.array([*values, None])])))
    config = {"min_clip_similarity": 0.28, "langs": ["en"] * 90}
    dataset = a_dataset(store, "aesthetics-filter", summary={"scores": {"clip_similarity": told}, "groups": 3}, config=config)
    console = Console(file=io.StringIO(), force_terminal=True, no_color=True, width=width)
    inspect_dataset(dataset, console)
    lines = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()  # type: ignore[attr-defined]
    where, *rest = lines
    assert where == f"where: {dataset.where}" and all(cell_len(line) <= width for line in rest), "\n".join(lines)
    assert any(line.startswith("clip_similarity: 5,000 rows, min_clip_similarity 0.28; 1 rows without it") for line in lines)

    bars = [re.match(r" *([\d.]+) \.\. ([\d.]+) +([\d,]+)  (.*?) +(\d+)%$", line) for line in lines]
    found = [(float(b[1]), float(b[2]), int(b[3].replace(",", "")), b[4].count("█"), int(b[5])) for b in bars if b]
    assert 5 < len(found) <= 12 and sum(rows for _, _, rows, _, _ in found) == 5000
    for low, high, rows, _, kept in found:
        assert rows == pytest.approx(np.sum((values >= low) & (values < high)), abs=3)
        assert kept == pytest.approx(100 * np.mean(values >= low), abs=1)
    most = max(rows for _, _, rows, _, _ in found)
    assert all(abs(length - 32 * rows / most) <= 1 for _, _, rows, length, _ in found)


def test_a_short_fingerprint_names_its_dataset(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    dataset = a_dataset(store, "laion-high-resolution-download")
    for name in (FINGERPRINT[:12], f"download/{FINGERPRINT[:12]}"):
        assert by_prefix(store, name).folder == dataset.folder


def test_where_is_the_folder_with_the_files(store: Store) -> None:
    unit = FINGERPRINT[:24]

    def entry(stage: str, unit: str, name: str) -> FileEntry:
        return FileEntry(f"{stage}/units/{unit}/{name}", 1, 1, FINGERPRINT, unit)

    export = [entry("export", unit, name) for name in ("uvit/config.json", "vae/config.json", "model_index.json")]
    assert a_dataset(store, "export", files=export).where == f"{store.root}/export/units/{unit}"
    tried = [entry("export", unit, f"@1/{name}") for name in ("uvit/config.json", "model_index.json")]
    assert a_dataset(store, "export", files=tried).where == f"{store.root}/export/units/{unit}/@1"
    two = [entry("evaluate", unit, "sheet.png"), entry("evaluate", unit[::-1], "sheet.png")]
    assert a_dataset(store, "evaluate", files=two).where == f"{store.root}/evaluate/{FINGERPRINT}"


def test_a_line_ends_between_words_and_a_long_word_at_its_joints() -> None:
    assert shown(Words("[red]one two[/] three"), 8) == ["one two", "three"]
    assert shown(Words("laion-high-resolution-download"), 22) == ["laion-high-resolution-", "download"]
    assert shown(Words("is min_aesthetic: None -> 5.5"), 10) == ["is min_", "aesthetic:", "None ->", "5.5"]
    assert shown(Words("abcdefghij"), 4) == ["abcd", "efgh", "ij"]
    assert shown(Words("キャプション"), 5) == ["キャ", "プシ", "ョン"]
