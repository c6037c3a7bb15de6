"""The graph of a run: what became of every node, what was made from what, and where its boxes lead."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from infra.dataset import Dataset, Stats, commit
from infra.store import Store
from pipelines.commands.terminal import TerminalView
from pipelines.flows.run import Outcome, Run, plan_run
from pipelines.pages.lineage import ancestors, mermaid, words
from pipelines.servers.servers import Servers
from stages.runner.recipe import load_recipe
from tests.pipelines.commands.test_plain import a_dataset
from tests.pipelines.conftest import write_metadata

RECIPE = """
name: graph
subsets:
  a: {select: {metadata: [metadata/*.parquet]}, download: {}, filter: {}}
  b: {from: a-download, filter: {min_side: 300}}
  c: {from: a-download, filter: {min_side: 400}}
  d: {from: a-download, filter: {min_side: 500}}
"""
ROWS = {"a-select": 60, "a-download": 1234, "a-filter": 20}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run in which one node was made, one reused, one failed and one stopped; of the others one has a dataset, one has none."""
    write_metadata(tmp_path / "metadata" / "part-0.parquet")
    (tmp_path / "graph.yaml").write_text(RECIPE)
    recipe, store = load_recipe(tmp_path / "graph.yaml"), Store(str(tmp_path / "store"))
    view = TerminalView(Console(file=io.StringIO()))
    run = Run(recipe, store, plan_run(recipe, store), list(recipe.nodes)[1:], Servers(tmp_path), view)
    made = {node: a_dataset_of(run, node, rows) for node, rows in ROWS.items()}
    for outcome in (
        Outcome("a-download", "reused", 0.1, made["a-download"]),
        Outcome("a-filter", "made", 2.0, made["a-filter"]),
        Outcome("b-filter", "failed", 1.0),
        Outcome("c-filter", "stopped"),
    ):
        run.finish(outcome)
    run.pages["a-filter"] = "page-of-filter"
    return run


def a_dataset_of(run: Run, node: str, rows: int) -> Dataset:
    planned = run.planned[node]
    manifest = a_dataset(run.store, planned.stage, planned.fingerprint, planned.inputs).manifest
    return commit(run.store, manifest.model_copy(update={"node": node, "stats": Stats(rows + 7, rows, {"small": 7})}))


def boxes(graph: str) -> dict[str, tuple[str, str, str]]:
    """Node -> (rows, beginning of its fingerprint, class)."""
    found = re.findall(r'^  n_\w+\["([\w-]+)<br/>([^<]+)<br/>(\w+)"\]:::(\w+)$', graph, re.MULTILINE)
    return {node: (rows, start, kind) for node, rows, start, kind in found}


def test_every_node_has_the_colour_of_what_became_of_it_and_its_own_rows(run: Run) -> None:
    graph = mermaid(run, run.nodes)
    starts = {node: planned.fingerprint[:8] for node, planned in run.planned.items()}
    assert boxes(graph) == {
        # Before the nodes of this run, which begins behind it.
        "a-select": ("60 rows", starts["a-select"], "reused"),
        "a-download": ("1,234 rows", starts["a-download"], "reused"),
        "a-filter": ("20 rows", starts["a-filter"], "made"),
        "b-filter": ("no dataset", starts["b-filter"], "failed"),
        "c-filter": ("no dataset", starts["c-filter"], "waiting"),
        "d-filter": ("no dataset", starts["d-filter"], "waiting"),
    }
    colours = dict(re.findall(r"classDef (\w+) (fill:#\w+)", graph))
    assert {kind for _, _, kind in boxes(graph).values()} == set(colours) and len(set(colours.values())) == 4


def test_the_arrows_lead_from_what_was_made_first_and_every_box_to_its_page(run: Run) -> None:
    graph = mermaid(run, run.nodes)
    assert set(re.findall(r"^  n_(\w+) --> n_(\w+)$", graph, re.MULTILINE)) == {
        ("a_select", "a_download"), *(("a_download", f"{subset}_filter") for subset in "abcd"),
    }  # fmt: skip
    links = dict(re.findall(r'^  click n_(\w+) href "([^"]+)"$', graph, re.MULTILINE))
    assert links.pop("a_filter") == "/v2/artifacts/artifact/page-of-filter"
    assert links == {node.replace("-", "_"): f"/v2/artifacts/key/graph-{node}" for node in run.planned if node != "a-filter"}


def test_a_graph_of_some_nodes_has_their_inputs_and_nothing_else(run: Run) -> None:
    assert set(boxes(mermaid(run, ["b-filter", "d-filter"]))) == {"a-download", "b-filter", "d-filter"}


def test_a_long_name_takes_two_lines_and_loses_nothing() -> None:
    assert words("twelve-of-it-xyz") == "twelve-of-it-xyz"
    assert words("thirteen-it-xyzw") == "thirteen-it-xyzw" and words("thirteen-of-it-xyz") == "thirteen-of-it-<br/>xyz"
    assert words("laion-aesthetic-filter").replace("<br/>", "") == "laion-aesthetic-filter"


def test_what_made_a_dataset_is_told_down_to_what_is_gone(run: Run) -> None:
    made = {node: outcome.dataset for node, outcome in run.outcomes.items() if outcome.dataset}
    run.store.remove(f"select/{run.planned['a-select'].fingerprint}")
    tree = ancestors(run.store, made["a-filter"])
    (download,) = tree.branches
    (select,) = download.branches
    start = {node: planned.fingerprint[:12] for node, planned in run.planned.items()}
    assert tree.label.startswith(f"a-filter {start['a-filter']} (20 rows, ")
    assert download.label.startswith(f"a-download {start['a-download']} (1,234 rows, ")
    assert select.label == f"select {start['a-select']} (removed)" and select.branches == []
    told = tree.as_json("made_from")["made_from"][0]
    assert (told["node"], told["rows"], told["made_from"][0]["rows"]) == ("a-download", 1234, None)
