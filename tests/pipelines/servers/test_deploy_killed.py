"""Runs whose process is killed: a deployment's comes back to its job, a command's on a server of the user's own is marked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.processes import marked
from infra.ray_jobs import RayJobs
from infra.store import Store
from pipelines.flows.jobs import ATTACHED, _follow
from pipelines.servers.machine import _is_flow
from stages.runner.graph import plan
from stages.runner.recipe import load_recipe
from tests.pipelines.conftest import Command, survivors, write_recipe
from tests.pipelines.servers.machine import AFTER, TINY, Machine, wait_for

pytestmark = pytest.mark.slow


def driver_of(fingerprint: str, machine: Machine) -> psutil.Process | None:  # noqa: F811
    """The process of a node's Ray job, once it is there."""
    for process in marked(machine.store / ".state"):
        with contextlib.suppress(psutil.Error):
            if (line := process.cmdline())[1:3] == ["-m", "stages"] and fingerprint in line:
                return process
    return None


def said_in(machine: Machine, run: str) -> Counter[str]:  # noqa: F811
    """What a run has in Prefect of its jobs' logs."""
    found: list[Any] = []
    while page := machine.api("POST", "logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "offset": len(found)}):
        found += page
    return Counter(line["message"] for line in found if line["name"] == "prefect.task_runs.job")


def test_another_deployment_does_not_make_the_server_forget_the_runs_that_it_watches(machine: Machine) -> None:  # noqa: F811
    def triggers() -> list[str]:
        return sorted(automation["trigger"]["id"] for automation in machine.api("POST", "automations/filter", {}))

    machine.deploy(TINY)
    before = triggers()
    machine.deploy(TINY)
    assert before and triggers() == before


def test_the_job_survives_another_recipe_s_run_and_each_of_its_lines_comes_once(machine: Machine) -> None:  # noqa: F811
    machine.deploy(TINY)
    machine.deploy(AFTER)
    wide = {"nodes": {"only": ["good-select"]}, "config": {"good-select": {"min_width": 370}}}
    run = machine.begin("recipe/tiny", **wide)
    planned = plan(load_recipe(machine.recipe(TINY), ["subsets.good.select.min_width=370"]), Store(str(machine.store)))
    fingerprint, ray = planned["good-select"].fingerprint, machine.server("ray")
    job, jobs = f"good-select-{fingerprint}-1", RayJobs(ray.address, ray.token)
    # Ray has said its first lines then, and no more come until all the rest has happened. It does not know the driver yet, which
    # it would ask in vain when it is to list its jobs.
    driver = wait_for(lambda: driver_of(fingerprint, machine))
    driver.suspend()
    try:
        wait_for(lambda: len(said_in(machine, run)) > 1)
        assert jobs.running()[job] == {"flow_run": run}
        (process,) = [process for process in marked(machine.store / ".state") if _is_flow(process)]
        process.kill()
        other = machine.begin("recipe/after")
        assert machine.end(other) == ("COMPLETED", "1 datasets made, 0 reused")
        wait_for(lambda: ATTACHED.format(job) in said_in(machine, run))
    finally:
        driver.resume()
    assert machine.end(run) == ("COMPLETED", "1 datasets made, 0 reused")
    assert jobs.statuses()[job] == "SUCCEEDED" and f"good-select-{fingerprint}-2" not in jobs.statuses()
    heard: Counter[str] = Counter()
    _follow(jobs, job, threading.Event(), lambda level, text: heard.update([text]), lambda fields: None)
    said = said_in(machine, run)
    assert heard and {text: said[text] for text in heard} == heard


def test_a_killed_command_does_not_stay_running_on_a_server_that_is_not_its_own(machine: Machine, tmp_path: Path) -> None:  # noqa: F811
    recipe, store = write_recipe(tmp_path), tmp_path / "store"
    arguments, token = ["run", str(recipe), "--only", "good-select", "--store", str(store)], machine.server("prefect").token
    command = Command(
        subprocess.Popen(
            [sys.executable, "-m", "pipelines.command", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PREFECT_API_URL": f"{machine.address}/api", "PREFECT_API_AUTH_STRING": str(token)},
            start_new_session=True,
        )
    )
    try:
        command.read_until("pick")
        command.finish(signal.SIGKILL)
        (run,) = [run for run in machine.api("POST", "flow_runs/filter", {}) if run["deployment_id"] is None]
        assert machine.end(run["id"]) == ("CRASHED", "its process died: no heartbeat came any more")
    finally:
        for process in survivors(store):
            process.kill()


def test_a_run_that_was_killed_before_its_first_heartbeat_does_not_stay_running(machine: Machine) -> None:  # noqa: F811
    machine.deploy(TINY)
    flow = machine.api("POST", "flows/", {"name": "recipe"})["id"]
    run = machine.api("POST", "flow_runs/", {"flow_id": flow})["id"]
    machine.api("POST", f"flow_runs/{run}/set_state", {"state": {"type": "RUNNING", "name": "Running"}})
    assert machine.end(run) == ("CRASHED", "its process died: no heartbeat came any more")
