"""The page of a dataset: what it says, that no picture can fail it, and that it lists the versions of its node."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.settings import temporary_settings
from rich.console import Console

from infra.dataset import Dataset, Manifest, Stats, commit, point
from infra.store import Store
from pipelines.commands.terminal import TerminalView
from pipelines.flows.run import Outcome, Result, Run, plan_run
from pipelines.pages import artifacts, progress
from pipelines.pages import pictures as page_pictures
from pipelines.pages.artifacts import _reasons, dataset_page, publish_page
from pipelines.pages.results import losses
from pipelines.pages.versions import add_user, find_others
from pipelines.servers.servers import Servers
from stages.catalog import stage_class
from stages.runner.contract import result_fields
from stages.runner.recipe import Recipe, load_recipe
from stages.shards.tar import Sample, ShardWriter
from tests.pipelines.commands.test_plain import a_dataset
from tests.pipelines.conftest import Kept, write_metadata

PAST = "2026-01-01T00:00:00+00:00"
SELECT = stage_class("select").version


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def recipe(folder: Path, width: int) -> Recipe:
    if not (folder / "metadata").exists():
        write_metadata(folder / "metadata" / "part-0.parquet")
    path = folder / "pages.yaml"
    path.write_text(f"name: pages\nsubsets:\n  a: {{select: {{metadata: [metadata/*.parquet], min_width: {width}}}}}\n")
    return load_recipe(path)


def a_run(recipe: Recipe, store: Store) -> Run:
    view = TerminalView(Console(file=io.StringIO()))
    return Run(recipe, store, plan_run(recipe, store), list(recipe.nodes), Servers(recipe.folder), view)


def made(run: Run, **fields: Any) -> Dataset:
    """The dataset of `a-select` without its files."""
    planned = run.planned["a-select"]
    known = {
        "stage": "select", "node": planned.name, "fingerprint": planned.fingerprint, "generation": 0, "inputs": {},
        "config": result_fields(planned.config), "sources": planned.all_sources, "columns": {"url": "string"},
        "code": {"stage_version": SELECT, "package": "0.1.0", "git": "0123456789ab+"}, "summary": {}, "seconds": 2.0,
        "stats": Stats(rows_in=60, rows_out=44, dropped={"min_width": 15, "language": 1}), "created": PAST, "files": [],
    }  # fmt: skip
    return commit(run.store, Manifest(**{**known, **fields}))


def page_of(run: Run, result: Result, dataset: Dataset) -> str:
    return dataset_page(run, run.planned["a-select"], Outcome("a-select", result, 2.0, dataset))


def test_a_page_says_which_code_made_how_much_of_what_and_what_was_dropped(tmp_path: Path, store: Store) -> None:
    run = a_run(recipe(tmp_path, 256), store)
    (tmp_path / "rows.parquet").write_bytes(bytes(2_300_000))
    files = a_dataset(store, "select", "ab" * 12, {}, tmp_path / "rows.parquet").files
    page = page_of(run, "made", made(run, files=files))
    assert "made by" not in page, "nobody knows which run"
    run.flow_run = "0f" * 16
    assert f"made by [this run](/v2/runs/flow-run/{run.flow_run})" in page_of(run, "made", made(run, files=files))
    assert f"| code | stage version {SELECT}, package 0.1.0, commit 0123456789ab+ |" in page
    assert "| files | 1, 2.3 MB |" in page
    assert "| rows in | 60 |" in page and "| rows out | 44 |" in page
    assert "| min_width | 15 | 25.0% |" in page and "| language | 1 | 1.7% |" in page
    assert re.search(r'## Schema\n\n```json\n\{\n "url": "string"\n\}', page)
    assert '"min_width": 256' in page.split("## Configuration")[1].split("## ")[0]


def test_a_made_version_says_what_differs_from_the_version_before(tmp_path: Path, store: Store) -> None:
    before = a_run(recipe(tmp_path, 256), store)
    point(store, "pages", "a-select", made(before).manifest.reference())
    run = a_run(recipe(tmp_path, 300), store)
    assert "## Changed\n\n- `min_width: 256 -> 300`\n" in page_of(run, "made", made(run))


def test_the_page_of_a_run_begins_with_what_its_recipe_says_it_is(tmp_path: Path, store: Store) -> None:
    run = a_run(recipe(tmp_path, 256), store)
    assert "\n\nThe datasets of this run and what they were made from.\n\n" in artifacts.run_page(run)
    run.recipe = replace(run.recipe, description="Sunsets over water.")
    assert "\n\nSunsets over water.\n\n" in artifacts.run_page(run)


def test_a_version_that_a_killed_run_made_says_what_differs_as_well(tmp_path: Path, store: Store) -> None:
    """Its dataset is there, so the plan has nothing to say; the page before it names what it differs from."""
    before = made(a_run(recipe(tmp_path, 256), store)).manifest
    run = a_run(recipe(tmp_path, 300), store)
    planned = replace(run.planned["a-select"], state="hit", reasons=[])
    page = SimpleNamespace(description=f"select {before.fingerprint}")
    for result in ("made", "reused"):
        outcome = Outcome("a-select", result, 2.0, made(run))  # type: ignore[arg-type]
        assert _reasons(run, planned, outcome, page) == ["min_width: 256 -> 300"]  # type: ignore[arg-type]
        assert _reasons(run, planned, outcome, None) == []


def picture(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (250, 0, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_is_made_no_smaller_than_a_page_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    buffers = {kind: io.BytesIO() for kind in ("PNG", "JPEG")}
    noise.save(buffers["PNG"], "PNG")
    noise.save(buffers["JPEG"], "JPEG", quality=85)
    sizes = {kind: len(buffer.getvalue()) * 4 / 3 for kind, buffer in buffers.items()}
    assert sizes["JPEG"] + 1 < sizes["PNG"]
    for most, kind, width in ((sizes["PNG"], "png", 200), (sizes["JPEG"], "jpeg", 200), (sizes["JPEG"] - 1, "jpeg", 150)):
        monkeypatch.setattr(page_pictures, "PICTURE_BYTES", most)
        head, _, data = page_pictures.picture_uri(buffers["PNG"].getvalue()).partition(",")
        assert head == f"data:image/{kind};base64" and len(data) <= most + 4
        assert Image.open(io.BytesIO(base64.b64decode(data))).width == width


def test_pictures_that_cannot_be_shown_leave_a_page_without_them(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    with ShardWriter(tmp_path / "0.tar") as shard:
        for number, image in enumerate((b"no picture", picture((400, 400)), picture((60, 60)))):
            shard.add(Sample(f"{number:05d}", image, "png", f"caption {number}", {}))
    for name in ("good.png", "gone.png"):
        (tmp_path / name).write_bytes(picture((8, 8)))
    files = a_dataset(store, "select", "ab" * 12, {}, *(tmp_path / n for n in ("0.tar", "good.png", "gone.png"))).files
    Path(store.url(files[2].path)).unlink()
    run = a_run(recipe(tmp_path, 256), store)
    # Scores that no histogram can be drawn of.
    page = page_of(run, "made", made(run, files=files, summary={"scores": {"aesthetic": {"counts": [3]}}}))
    assert "![good.png](data:" in page and "gone.png](data:" not in page
    assert "caption 2" in page and "caption 0" not in page and "caption 1" not in page
    said = "\n".join(record.getMessage() for record in caplog.records)
    for words in ("gone.png", "the picture 00000", "too_many_pixels", "the scores of a-select"):
        assert words in said


def test_a_server_that_refuses_fails_neither_progress_nor_pages(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise ConnectionError("nobody there")

    for place in (progress, artifacts):
        monkeypatch.setattr(place, "create_markdown_artifact", refuses)
        monkeypatch.setattr(place, "get_client", refuses)
    monkeypatch.setattr(progress, "create_progress_artifact", refuses)
    run = a_run(recipe(tmp_path, 256), store)
    run.view.started("a-select")
    progress.ProgressArtifact(run, "a-select").report({"phase": "write", "done": 1, "total": 2, "unit": "units"})
    progress.TrainingArtifact(run, "a-select").report({"phase": "train", "done": 1, "total": 2, "loss": 0.5})
    progress.TrainingArtifact(run, "a-select").report({"done": 1, "picture": "not/there.png"})
    publish_page(run, run.planned["a-select"], Outcome("a-select", "made", 2.0, made(run)))
    artifacts.publish_run_page(run)
    said = [record.getMessage() for record in caplog.records if "cannot be shown" in record.getMessage()]
    assert len(said) == 5 and sum("nobody there" in line for line in said) == 4


def test_the_losses_of_steps_that_come_again_are_drawn_once(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "create_markdown_artifact", lambda *_: "a page")
    page = progress.TrainingArtifact(a_run(recipe(tmp_path, 256), store), "a-select")
    told = [(0, "validation"), (5, "train"), (10, "train"), (10, "validation"), (15, "train"), (20, "train"), (20, "validation")]
    # The workers are lost after step 20, and others go on from step 8; they come to the end.
    for loss, (step, kind) in enumerate([*told, *told[2:]]):
        page.report({"phase": kind, "done": step, "total": 30, "loss": loss})
    assert [(row["step"], row["kind"]) for row in page.rows] == told
    assert [row["loss"] for row in page.rows] == [0, 1, 7, 8, 9, 10, 11]


def test_evaluations_of_a_training_are_a_line_each_on_its_page(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(progress, "create_markdown_artifact", lambda text, *_: shown.append(text) or "a page")
    page = progress.TrainingArtifact(a_run(recipe(tmp_path, 256), store), "a-select")
    told = {"node": "a-select", "phase": "evaluate", "total": 400, "unit": "steps", "report": "x.json"}
    page.measured = {100: {"fid_clip": 31.25}}
    page.report({**told, "done": 200, "fid_clip": 25.5, "bleu4": 3.0})
    lines = [line for line in shown[0].split("## Evaluations")[1].splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "--" not in line] == [
        ["step", "fid clip", "bleu4"], ["100", "31.25", ""], ["200", "25.5", "3"],
    ]  # fmt: skip


@pytest.fixture
def server(kept: Kept) -> Iterator[None]:
    """Prefect's client of this process asks the server of `kept`, which is left as it was."""
    with temporary_settings(kept.settings()):
        yield
        with get_client(sync_client=True) as client:
            for page in client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["pages-a-select"]))):
                client.delete_artifact(page.id)


def pages() -> list[Any]:
    """The pages of the node, the newest first."""
    key = ArtifactFilter(key=ArtifactFilterKey(any_=["pages-a-select"]))
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=key, sort="CREATED_DESC")


def versions(page: str) -> list[str]:
    return re.findall(
        r"^- \[?`([0-9a-f]{24})`.*?(?:: (`.*))?$", page.split("## Versions\n\n")[1].split("\n\n## ")[0], re.MULTILINE
    )


def test_a_version_has_one_page_whichever_runs_reuse_it_and_older_ones_are_linked_by_id(
    tmp_path: Path, store: Store, server: None
) -> None:
    first = a_run(recipe(tmp_path, 256), store)
    old = made(first)

    def publish(run: Run, dataset: Dataset, result: Result) -> str:
        publish_page(run, run.planned["a-select"], Outcome("a-select", result, 2.0, dataset))
        point(store, "pages", "a-select", dataset.manifest.reference())
        return run.pages["a-select"]

    page_of_old = publish(first, old, "made")
    again = a_run(recipe(tmp_path, 256), store)
    assert publish(again, old, "reused") == page_of_old
    assert [str(page.id) for page in pages()] == [page_of_old], "a reuse is no version"
    with get_client(sync_client=True) as client:
        links = [str(a.data) for a in client.read_artifacts(sort="CREATED_DESC", limit=5) if a.key is None]
    assert any(f"(/v2/artifacts/artifact/{page_of_old})" in link for link in links), "but its run shows it"
    second = a_run(recipe(tmp_path, 300), store)
    new = made(second)
    page_of_new = publish(second, new, "made")
    assert publish(second, new, "reused") == page_of_new
    line_of_new = (new.manifest.fingerprint, "`min_width: 256 -> 300`")
    (page, _) = pages()
    assert versions(str(page.data)) == [line_of_new, (old.manifest.fingerprint, "")]
    assert f"Against [the version before](/v2/artifacts/artifact/{page_of_old}):\n\n- `min_width: 256 -> 300`" in str(page.data)
    assert f"- [`{old.manifest.fingerprint}`](/v2/artifacts/artifact/{page_of_old})," in str(page.data)
    back = a_run(recipe(tmp_path, 256), store)
    publish(back, old, "reused")
    line_of_old = (old.manifest.fingerprint, "`min_width: 300 -> 256`")
    assert versions(str(pages()[0].data)) == [line_of_old, line_of_new, (old.manifest.fingerprint, "")]
    # A run of what follows alone links the version that it takes, not the newest.
    left_out = a_run(recipe(tmp_path, 300), store)
    left_out.nodes = []
    with get_client(sync_client=True) as client:
        find_others(client, left_out)
    assert left_out.pages == {"a-select": page_of_new}


def test_what_is_made_of_a_dataset_comes_onto_its_page(tmp_path: Path, store: Store, server: None) -> None:
    run = a_run(recipe(tmp_path, 256), store)
    dataset = made(run)
    publish_page(run, run.planned["a-select"], Outcome("a-select", "made", 2.0, dataset))
    user = dataset.manifest.model_copy(update={"node": "a-download", "fingerprint": "cd" * 12})
    with get_client(sync_client=True) as client:
        for _ in range(2):
            add_user(client, run.pages["a-select"], dataset.manifest, user, "/v2/artifacts/artifact/there")
    graph = str(pages()[0].data).split("```mermaid")[1].split("```")[0]
    assert graph.count("a-download<br/>44 rows<br/>cdcdcdcd") == 1
    assert f"n_{dataset.manifest.fingerprint} --> n_{'cd' * 12}\n" in graph and '_cd" href' not in graph
    assert 'href "/v2/artifacts/artifact/there"' in graph


def test_the_page_of_a_filter_shows_the_funnel_from_the_first_row_and_the_names_of_its_encoders(
    tmp_path: Path, store: Store
) -> None:
    whole = load_recipe(write_filter(tmp_path))
    run = Run(whole, store, plan_run(whole, store), list(whole.nodes), Servers(tmp_path), a_run(recipe(tmp_path, 1), store).view)
    below: dict[str, Any] = {}
    for node, (came, left) in {"a-select": (60, 40), "a-download": (40, 20), "a-filter": (20, 15)}.items():
        planned = run.planned[node]
        known = {"stage": planned.stage, "node": node, "fingerprint": planned.fingerprint, "inputs": dict(planned.inputs)}
        below[node] = made(run, **known, config={}, stats=Stats(came, left, {"x": came - left}))
    run.pages |= {"a-select": "page-of-select", "a-download": "page-of-download"}
    page = dataset_page(run, run.planned["a-filter"], Outcome("a-filter", "made", 2.0, below["a-filter"]))
    assert "| [a-select](/v2/artifacts/artifact/page-of-select) | 60 | 40 | 66.7% | 66.7% |" in page
    assert "| [a-download](/v2/artifacts/artifact/page-of-download) | 40 | 20 | 50.0% | 33.3% |" in page
    assert "| **a-filter** | 20 | 15 | 75.0% | 25.0% |" in page
    assert f"- clip: `embedded` `{run.planned['a-filter'].weights['clip'][:24]}`" in page
    assert (
        f"- rows: [a-download](/v2/artifacts/artifact/page-of-download) `download/{run.planned['a-download'].fingerprint}`"
        in page
    )
    graph = page.split("```mermaid")[1].split("```")[0]
    assert f"n_{run.planned['a-download'].fingerprint} --> n_{run.planned['a-filter'].fingerprint}" in graph


def write_filter(folder: Path) -> Path:
    recipe(folder, 1)
    path = folder / "whole.yaml"
    path.write_text("name: whole\nsubsets:\n  a: {select: {metadata: [metadata/*.parquet]}, download: {}, filter: {}}\n")
    return path


def test_losses_are_a_curve_and_a_short_table_that_ends_with_the_last() -> None:
    rows = [
        {"kind": kind, "step": step, "loss": 1 / step, "loss_text": 0.5}
        for step in range(1, 41)
        for kind in ("train", "validation")
    ]
    title, curve, told = losses("train-x", rows)
    assert title == "## Losses" and curve.startswith('<img alt="losses" src="data:image/png;base64,')
    lines = told.splitlines()
    assert lines[0] == "| step | loss on held-out rows | text |" and len(lines) <= 2 + 6
    assert lines[-1] == "| 40 | 0.0250 | 0.5000 |"
    assert losses("train-x", []) == []


def test_what_a_training_met_that_was_damaged_is_told() -> None:
    rows: list[Any] = [{"kind": "train", "step": step, "loss": 1.0, "skipped": step} for step in (1, 2)]
    rows.append({"kind": "damage", "step": 2, "said": "went back"})
    assert losses("train-x", rows)[3:] == [
        "## Damage",
        "- 2 steps were skipped because their loss or gradient was not finite, or a spike\n- at step 2: went back",
    ]


def test_losses_of_the_average_have_a_column_and_those_by_noise_a_table_of_the_last_validation() -> None:
    noise = {"loss_image_t1": 0.9, "loss_image_t8": 0.1, "loss_text_t2": 0.7}
    row = {"kind": "validation", "step": 4, "loss": 0.5, "ema_loss": 0.4, "ema_loss_image_t1": 0.8, "loss_image": 0.6, **noise}
    _, _, told, by_noise = losses("train-x", [row])
    assert told.splitlines()[0] == "| step | loss on held-out rows | with the averaged weights | image |"
    assert told.splitlines()[-1] == "| 4 | 0.5000 | 0.4000 | 0.6000 |"
    lines = by_noise.splitlines()
    assert lines[0] == "| step 4, from clean to noise | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |"
    assert [line.replace(" ", "") for line in lines[2:]] == ["|image|0.9000|||||||0.1000|", "|text||0.7000|||||||"]


def test_a_comparison_has_a_page_with_what_differs(server, kept):
    from pipelines.commands.comparison import compare
    from pipelines.commands.sides import side_of
    from pipelines.pages.comparison import publish_comparison

    place = Store(str(kept.store))
    facts = compare(side_of("tiny", place), side_of("tiny/good-select", place))
    facts["nodes"][0]["differ"] = {"min_width": [256, None], "words": ["a | b", "`c`"]}
    link = publish_comparison(facts, None)
    with get_client(sync_client=True) as client:
        asked = ArtifactFilter(key=ArtifactFilterKey(any_=["compare-tiny-tiny-good-select"]))
        (page,) = client.read_artifacts(artifact_filter=asked)
    assert link == f"/v2/artifacts/artifact/{page.id}" and page.description == "tiny against tiny/good-select"
    assert "| good-select | `min_width` | `256` | `not set` |" in page.data
    assert "| good-select | `words` | `a / b` | `'c'` |" in page.data
    assert "| good-select | 44 | 44 |" in page.data


def test_a_plan_has_a_page_with_what_the_store_measured(server, kept):
    from pipelines.pages.plan import publish_plan
    from pipelines.planning.devices import gpu_of
    from pipelines.planning.plan import Wish, asked_of, on_cluster

    place = Store(str(kept.store))
    facts = on_cluster(asked_of(load_recipe(kept.recipe), place), place, Wish(gpu_of("l4"), 1, 0.3, 1.0))
    link = publish_plan(facts)
    with get_client(sync_client=True) as client:
        (page,) = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["tiny-plan"])))
    assert link == f"/v2/artifacts/artifact/{page.id}" and page.description == "what it takes on 1 l4"
    assert re.search(r"\| good-select \| \d+ \| 44 \| measured: 44 of \d+ \|", page.data)
