"""`unidiffuser run` with a real Prefect server and a real Ray; the tests of a module share one run where they can."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from infra.dataset import all_datasets
from infra.processes import recorded
from infra.store import Store
from tests.pipelines.conftest import Kept, ask, start, survivors, write_recipe


def tasks_by_node(kept: Kept) -> dict[str, Any]:
    """Task runs by node; Prefect leaves a random suffix on the name of one that it never began."""
    return {re.sub("-[0-9a-f]{3}$", "", task["name"]): task for task in ask(kept.store, "POST", "task_runs/filter", {})}


def test_the_graph_has_one_task_a_node_and_the_edges_of_the_data(kept: Kept) -> None:
    (run,) = ask(kept.store, "POST", "flow_runs/filter", {})
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
    pages = {page["key"]: page["data"] for page in ask(kept.store, "POST", "artifacts/filter", {}) if page["key"]}
    assert sorted(pages) == ["tiny-good-select", "tiny-lineage"]
    (dataset,) = all_datasets(Store(str(kept.store)))
    page = pages["tiny-good-select"]
    assert f"select/{dataset.manifest.fingerprint}" in page
    assert "| rows in | 60 |" in page and "| rows out | 44 |" in page
    assert re.search(r"\| min_width \| 16 \| 26\.7% \|", page)
    assert "```mermaid\ngraph LR" in pages["tiny-lineage"]
    assert "n_bad_select --> n_bad_download" in pages["tiny-lineage"]


def test_the_log_of_the_job_is_in_the_ui_with_its_levels(kept: Kept) -> None:
    task = tasks_by_node(kept)["good-select"]
    lines = ask(kept.store, "POST", "logs/filter", {"logs": {"task_run_id": {"any_": [task["id"]]}}, "limit": 200})
    said = [(line["level"], line["message"]) for line in lines]
    assert any(level == 20 and "60 rows in, 44 out" in text for level, text in said), said
    assert not any(text.startswith("@progress") for _, text in said)


def test_ctrl_c_after_keep_ends_with_the_code_of_the_run_and_leaves_nothing(kept: Kept) -> None:
    servers = [recorded(name, kept.store / ".state") for name in ("prefect", "ray")]
    assert all(servers)
    code, _ = kept.close()
    assert code == 1
    assert survivors(kept.store) == []
    assert not any(psutil.pid_exists(server.pid) for server in servers if server)
    assert not Path(str(servers[1] and servers[1].folder)).exists()


def test_a_second_run_reuses_and_imports_neither_torch_nor_ray(kept: Kept) -> None:
    if kept.command.process.poll() is None:
        kept.close()
    script = (
        "import sys; from pipelines.command import app\n"
        f"try: app(['run', {str(kept.recipe)!r}, '--only', 'good-select', '--store', {str(kept.store)!r}])\n"
        "finally: print('imported:', sorted({'torch', 'ray', 'deepspeed', 'diffusers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "good-select reused 44 rows" in done.stdout
    assert "imported: []" in done.stdout
    assert survivors(kept.store) == []


def test_ctrl_c_in_a_node_stops_job_and_servers_and_the_next_run_finishes_even_after_a_kill(kept: Kept, tmp_path: Path) -> None:
    if kept.command.process.poll() is None:
        kept.close()
    recipe, store = write_recipe(tmp_path), tmp_path / "store"
    # Making Prefect's tables takes longer than all the rest.
    shutil.copytree(kept.store / ".state" / "prefect", store / ".state" / "prefect")
    chosen = ("run", recipe, "--only", "good-select", "--store", store)
    first = start(*chosen)
    first.read_until("pick 0/1")
    code, printed = first.finish(signal.SIGINT)
    assert code == 130 and "good-select stopped" in printed
    assert survivors(store) == []

    # Another threshold, in case the first job was quick enough to finish before it was stopped.
    chosen = (*chosen, "--set", "subsets.good.select.min_width=300")
    second = start(*chosen)
    second.read_until("pick")
    second.finish(signal.SIGKILL)
    ray = recorded("ray", store / ".state")
    assert ray is not None and survivors(store), "the servers outlive a command that was killed"

    third = start(*chosen, "--keep")
    third.read_until("Ctrl-C stops the servers")
    states = [run["state"]["type"] for run in ask(store, "POST", "flow_runs/filter", {"sort": "START_TIME_ASC"})][-3:]
    assert states == ["CANCELLED", "CRASHED", "COMPLETED"]
    code, printed = third.finish(signal.SIGINT)
    assert code == 0 and re.search(r"good-select (made|reused) 40 rows", printed)
    assert survivors(store) == []
    assert not Path(str(ray.folder)).exists()
