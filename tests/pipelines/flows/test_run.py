"""`unidiffuser run` with a real Prefect server and a real Ray; the tests of a module share one run where they can."""

from __future__ import annotations

import re
from typing import Any

from infra.dataset import all_datasets
from infra.store import Store
from tests.pipelines.conftest import Kept, ask, start


def tasks_by_node(kept: Kept) -> dict[str, Any]:
    """Task runs by node; Prefect leaves a random suffix on the name of one that it never began."""
    return {re.sub("-[0-9a-f]{3}$", "", task["name"]): task for task in ask(kept.store, "POST", "task_runs/filter", kept.of_it)}


def test_the_graph_has_one_task_a_node_and_the_edges_of_the_data(kept: Kept) -> None:
    (run,) = ask(kept.store, "POST", "flow_runs/filter", kept.of_it)
    assert run["name"] == "tiny"
    tasks = tasks_by_node(kept)
    assert sorted(tasks) == ["bad-download", "bad-select", "good-select"]
    parents = {
        name: [
            reference["id"]
            for group in task["task_inputs"].values()
            for reference in group
            if reference["input_type"] == "task_run"
        ]
        for name, task in tasks.items()
    }
    assert parents == {"good-select": [], "bad-select": [], "bad-download": [tasks["bad-select"]["id"]]}


def test_a_failing_node_says_why_in_the_terminal_and_in_the_ui_and_what_follows_is_not_run(kept: Kept) -> None:
    tasks = {node: task["state"] for node, task in tasks_by_node(kept).items()}
    assert tasks["bad-select"]["type"] == "FAILED"
    message = tasks["bad-select"]["message"]
    assert "no-url.parquet" in message and "\n" not in message
    printed = "".join(kept.command.lines)
    assert re.search(r"bad-select failed .*" + re.escape(message), printed)
    assert tasks["bad-download"]["name"] == "NotReady"
    assert re.search(r"bad-download {2,}not run", printed)


def test_a_made_node_leaves_its_page_with_counts_and_reasons(kept: Kept) -> None:
    pages = {page["key"]: page["data"] for page in ask(kept.store, "POST", "artifacts/filter", kept.of_it) if page["key"]}
    assert sorted(pages) == ["tiny-good-select", "tiny-lineage"]
    (dataset,) = all_datasets(Store(str(kept.store)))
    page = pages["tiny-good-select"]
    assert f"select/{dataset.manifest.fingerprint}" in page
    assert "| rows in | 60 |" in page and "| rows out | 44 |" in page
    assert re.search(r"\| min_width \| 16 \| 26\.7% \|", page)
    assert "\ngraph TD\n" in pages["tiny-lineage"]
    assert "n_bad_select --> n_bad_download" in pages["tiny-lineage"]


def test_the_log_of_the_job_is_in_the_ui_with_its_levels(kept: Kept) -> None:
    task = tasks_by_node(kept)["good-select"]
    lines = ask(kept.store, "POST", "logs/filter", {"logs": {"task_run_id": {"any_": [task["id"]]}}, "limit": 200})
    said = [(line["level"], line["message"]) for line in lines]
    assert any(level == 20 and "60 rows in, 44 out" in text for level, text in said), said
    assert not any(text.startswith("@progress") for _, text in said)


def test_logs_prints_the_log_of_a_nodes_newest_job_and_the_store_keeps_it(kept: Kept) -> None:
    for node, last in (("good-select", "60 rows in, 44 out"), ("bad-select", "no-url.parquet")):
        code, printed = start("logs", kept.recipe, node, "--follow", "--store", kept.store).finish()
        assert code == 0 and last in printed.splitlines()[-1] and "@progress" not in printed
        (log,) = (kept.store / ".state" / "logs" / "tiny").glob(f"{node}-*-1.log")
        assert log.read_text() == printed
