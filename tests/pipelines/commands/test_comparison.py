"""`unidiffuser compare`: what it says that differs, what A and B may be, and a file that needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from infra.dataset import Dataset, FileEntry, Manifest, Stats, point
from infra.dataset import commit as commit_dataset
from infra.store import NotThere, Store, sha256_of
from pipelines.commands.checkpoints import Misuse
from pipelines.commands.comparison import compare, histories
from pipelines.commands.comparison_page import page
from pipelines.commands.sides import side_of
from pipelines.pages.compared_curves import curves
from tests.pipelines.commands.test_sampling import say  # noqa: F401
from tests.unidiffuser.test_generation import export  # noqa: F401
from tests.unidiffuser.test_provenance import TOLD
from unidiffuser.provenance import write_provenance

HISTORY = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "validation", "step": 2, "loss": 1.5}]


def put(
    store: Store, stage: str, node: str, letter: str, inputs: dict[str, Dataset], files: dict[str, str] | None = None, **more: Any
) -> Dataset:
    """A dataset whose fingerprint is a letter 24 times."""
    entries = []
    for name, text in (files or {}).items():
        path = f"{stage}/units/{letter}{node}/{name}"
        store.write(path, text.encode())
        entries.append(FileEntry(path, 1, len(text), sha256_of(Path(store.url(path))), f"{letter}{node}"))
    fields: dict[str, Any] = {"config": {}, "stats": Stats(10, 10), "summary": {}} | more
    references = {name: each.manifest.reference() for name, each in inputs.items()}
    manifest = Manifest(
        stage=stage, node=node, fingerprint=letter * 24, generation=0, sources={}, code={"stage_version": 1, "git": "abc"},
        columns={}, inputs=references, seconds=1.0, files=entries,
        created=f"2026-01-0{int(letter, 16) % 9 + 1}T00:00:00+00:00", **fields,
    )  # fmt: skip
    return commit_dataset(store, manifest)


@pytest.fixture
def two(tmp_path: Path) -> Store:
    """Recipes `one` and `two` with the same select, another filter, and a training of each that was evaluated."""
    place = Store(str(tmp_path / "two"))
    select = put(place, "select", "x-select", "a", {}, stats=Stats(10, 8, {"too_small": 2}))
    for recipe, (a, b, c), side, lr, score in (("one", "b1c", 256, 0.1, 0.5), ("two", "d2e", 512, 0.1, 0.75)):
        left = 8 if side == 256 else 5
        stats = Stats(8, left, {"<b>small</b>": 8 - left} if left < 8 else {})
        rows = put(
            place, "filter", "x-filter", a, {"rows": select}, config={"min_side": side, "words": {"least": 3}}, stats=stats
        )
        rest = {"history.jsonl": "".join(json.dumps(row) + "\n" for row in HISTORY)}
        metrics = {"metrics": {"loss": 2 * lr, "loss_image_t1": 0.5, "ready": True}}
        config = {"optimizer": {"lr": lr}, "steps": side, "note": f"<script>{recipe}</script>"}
        train = put(place, "train", "train-x", b, {"data.x": rows}, rest, config=config, summary=metrics)
        figures = [{"name": "FID", "value": 100 * score, "by": "inception", "samples": 5}]
        report = {"figures": figures, "preference": {"text_to_image": score}, "curve": [[0, 1.0]], "checkpoint": "f00"}
        judged = put(place, "evaluate", "evaluate", c, {"checkpoint": train}, {"report.json": json.dumps(report)})
        for dataset in (select, rows, train, judged):
            point(place, recipe, dataset.manifest.node, dataset.manifest.reference())
    return place


def facts(store: Store, a: str, b: str) -> dict[str, Any]:
    return compare(side_of(a, store), side_of(b, store))


def test_what_differs_is_told_and_what_is_the_same_is_apart(two):
    told = facts(two, "one", "two")
    nodes = {node["node"]: node for node in told["nodes"]}
    assert list(nodes) == ["x-select", "x-filter", "train-x", "evaluate"]
    assert nodes["x-select"]["same"] and not nodes["x-select"]["differ"]
    assert nodes["x-filter"]["differ"] == {"min_side": [256, 512]}
    assert nodes["x-filter"]["equal"] == {"words.least": 3, "code: stage_version": 1, "code: git": "abc"}
    assert nodes["x-filter"]["rows"][1] == {"in": 8, "out": 5, "dropped": {"<b>small</b>": 3}}
    assert set(nodes["train-x"]["differ"]) == {"steps", "note"} and nodes["train-x"]["equal"]["optimizer.lr"] == 0.1
    assert told["figures"] == {
        "evaluate": {"FID (inception)": [50.0, 75.0], "preference.text_to_image": [0.5, 0.75]},
        "train-x": {"loss": [0.2, 0.2], "loss_image_t1": [0.5, 0.5]},
    }
    assert told["glance"][0] == "x-filter: min_side 256 → 512"
    assert "The same datasets: x-select." in told["glance"]
    assert told["glance"][-1] == "Measured, A → B: FID (inception) 50 → 75, preference.text_to_image 0.5 → 0.75."
    assert facts(two, "one", "one")["glance"] == ["Both sides are the same datasets."]


def test_a_node_a_dataset_and_a_path_mean_what_they_are_of(two, tmp_path):
    prefix = "d" * 6
    for name in ("two/x-filter", prefix, f"filter/{prefix}", two.url(f"filter/{'d' * 24}")):
        side = side_of(name, two)
        assert (side.head, list(side.made), side.checkpoint) == ("x-filter", ["x-select", "x-filter"], None)
    trained = side_of("two/train-x", two)
    assert list(trained.made) == ["x-select", "x-filter", "train-x", "evaluate"]
    assert trained.checkpoint == f"train/{'2' * 24}" and side_of("two", two).checkpoint == trained.checkpoint
    (tmp_path / "mine.yaml").write_text("name: two\nsubsets:\n  x: {select: {metadata: [x.parquet]}}\n")
    assert list(side_of(str(tmp_path / "mine.yaml"), two).made) == list(trained.made)
    (tmp_path / "mine.yaml").write_text("name: new\nsubsets:\n  x: {select: {metadata: [x.parquet]}}\n")
    with pytest.raises(Misuse, match="the recipe new has no dataset in .* yet; run it, or name another --store"):
        side_of(str(tmp_path / "mine.yaml"), two)
    with pytest.raises(NotThere, match="0123abcd: no dataset in"):
        side_of("0123abcd", two)


def test_nodes_of_two_names_answer_to_each_other(two):
    told = facts(two, "one/x-filter", "two/train-x")
    assert [node["node"] for node in told["nodes"]] == ["x-select", "x-filter", "x-filter / train-x", "evaluate"]
    assert told["nodes"][1]["datasets"] == [None, "d" * 24]
    assert "Only B has x-filter, evaluate." in told["glance"]


class Read(HTMLParser):
    """What a browser would fetch or run, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.fetched, self.words = list[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_file_needs_nothing_else_and_shows_what_data_says_as_text(two):
    sides = [side_of(name, two) for name in ("one", "two")]
    read = Read(page(compare(*sides), curves([histories(side) for side in sides]), {}))
    assert "script" not in read.tags and "b" in read.tags and "link" not in read.tags
    assert len(read.fetched) == 1 and read.fetched[0].startswith("data:image/png;base64,")
    text = " ".join(read.words)
    for words in ("<script>two</script>", "3 <b>small</b>", "2 fields are the same", "The same dataset on both sides: x-select."):
        assert words in text, words
    assert re.search(r"preference\. ?text_ ?to_ ?image 0\.5 0\.75 \+0\.25", text)
    assert curves([{}, {}]) is None


def test_two_checkpoints_draw_the_same_prompts_with_the_same_seeds(export, tmp_path, say):  # noqa: F811
    one, other = (Path(shutil.copytree(export, tmp_path / name)) for name in ("one", "other"))
    write_provenance(one, TOLD)
    write_provenance(other, {**TOLD, "config": {"global_batch": 2048}})
    weights = load_file(other / "uvit" / "model.safetensors")
    save_file({name: 1.1 * value for name, value in weights.items()}, other / "uvit" / "model.safetensors")
    few = ("--prompt", "a small panda", "--count", 2, "--steps", 2, "--store", tmp_path / "store")
    pictures = []
    for b in (one, other):
        file = tmp_path / f"{b.name}.html"
        code, printed, complaint = say("compare", one, b, *few, "--out", file, "--json")
        assert code == 0, complaint
        told = json.loads(printed)
        fetched = Read(file.read_text()).fetched
        # One of the prompt and two of both together, of each side.
        assert len(fetched) == 6 and told["file"] == str(file) and told["page"] is None
        pictures.append(fetched)
    assert pictures[0][:1] + pictures[0][2:4] == pictures[0][1:2] + pictures[0][4:]
    assert not set(pictures[1][:1] + pictures[1][2:4]) & set(pictures[1][1:2] + pictures[1][4:])
    assert pictures[1][0] == pictures[0][0]
    assert list(told["nodes"][-1]["differ"]) == ["global_batch", "weights: uvit/model.safetensors"]
    assert told["nodes"][-1]["differ"]["global_batch"] == [1024, 2048]


def test_folders_tell_their_evaluations_and_whether_their_weights_are_the_same(export, tmp_path):  # noqa: F811
    def folder(name: str, fid: float, scale: float) -> str:
        place = Path(shutil.copytree(export, tmp_path / name))
        figures = [{"name": "fid", "value": fid, "by": "inception", "samples": 5}]
        write_provenance(place, {**TOLD, "evaluation": {"fingerprint": f"{fid:.0f}" * 12, "figures": figures}})
        weights = load_file(place / "uvit" / "model.safetensors")
        save_file({key: scale * value for key, value in weights.items()}, place / "uvit" / "model.safetensors")
        return str(place)

    store = Store(str(tmp_path / "store"))
    good, bad, zeroed = folder("good", 10, 1), folder("bad", 99, 1), folder("zeroed", 10, 0)
    told = facts(store, good, bad)
    assert told["figures"] == {"evaluate": {"fid (inception)": [10, 99]}}
    assert "Measured, A → B: fid (inception) 10 → 99." in told["glance"]
    assert re.search(r"fid \(inception\) 10 99 \+89", " ".join(Read(page(told, None, {})).words))
    assert facts(store, good, good)["glance"] == ["Both sides are the same datasets."]
    [node] = [each for each in facts(store, good, zeroed)["nodes"] if not each["same"]]
    assert list(node["differ"]) == ["weights: uvit/model.safetensors"]
    digests = [sha256_of(Path(side, "uvit", "model.safetensors")) for side in (good, zeroed)]
    assert node["differ"]["weights: uvit/model.safetensors"] == digests
    assert facts(store, good, zeroed)["glance"][0].startswith("train-256: weights: uvit/model.safetensors ")


def test_what_cannot_be_drawn_is_compared_without_samples_and_said(two, say):  # noqa: F811
    code, printed, complaint = say("compare", "one/x-filter", "two/x-filter", "--store", two.root)
    assert code == 0, complaint
    assert "- No samples: one/x-filter has no checkpoint." in printed.splitlines()
    file = Path(two.root, ".state", "comparisons", "one-x-filter-against-two-x-filter.html")
    assert f"The comparison: {file}" in printed and "min_" in file.read_text()
    (file.parent / "file").write_text("")
    code, _, complaint = say("compare", "one", "two", "--store", two.root, "--out", file.parent / "file" / "a.html", "--count", 0)
    assert code == 2 and len(complaint.splitlines()) == 1 and "cannot be written" in complaint
