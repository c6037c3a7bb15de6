"""How `unidiffuser run` ends: Ctrl-C after `--keep`, the servers gone, a command that is killed. They end the run that the other
tests of a real server share, and so come after the folders beside this file."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from infra.processes import recorded
from tests.pipelines.conftest import Kept, ask, start, survivors, write_recipe


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
    # Prefect may have planned runs of deployments that other tests have made and removed.
    begun = {"sort": "START_TIME_ASC", "flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}}}
    states = [run["state"]["type"] for run in ask(store, "POST", "flow_runs/filter", begun)][-3:]
    assert states == ["CANCELLED", "CRASHED", "COMPLETED"]
    code, printed = third.finish(signal.SIGINT)
    assert code == 0 and re.search(r"good-select (made|reused) 40 rows", printed)
    assert survivors(store) == []
    assert not Path(str(ray.folder)).exists()
