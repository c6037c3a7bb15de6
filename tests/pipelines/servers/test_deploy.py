"""Deployments on a real Prefect server, worker and Ray that `unidiffuser up` started; the tests share them, in this order."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import psutil
import pytest

from infra.prefect_server import HEARTBEAT_SECONDS, prefect_environment
from infra.ray_jobs import RayJobs
from infra.store import Store
from stages.runner.graph import plan
from stages.runner.recipe import load_recipe
from tests.pipelines.conftest import start, survivors, write_metadata
from tests.pipelines.servers.machine import AFTER, ENDS, NIGHTLY, TINY, Machine, wait_for


def test_up_starts_all_three_and_up_again_starts_nothing(machine: Machine) -> None:
    names = ("prefect", "ray", "worker")
    before = {name: machine.server(name).pid for name in names}
    assert machine.printed.count("started") == 3
    code, printed = start("up", "--store", machine.store).finish()
    assert code == 0 and printed.count("was running") == 3 and "started" not in printed
    assert before == {name: machine.server(name).pid for name in names}


def test_another_shell_is_let_in_by_the_lines_that_up_prints(machine: Machine) -> None:
    lines = [line for line in machine.printed.splitlines() if line.startswith("export ")]
    asks = (
        "from infra.prefect_server import check_api, configured_api; from infra.ray_cluster import configured_ray\n"
        "from infra.ray_jobs import RayJobs, user_token\n"
        "check_api(configured_api()); print(configured_api(), RayJobs(configured_ray(), user_token()).ready())"
    )
    script = "\n".join([*lines, f"{sys.executable} -c '{asks}'"])
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [f"{machine.address}/api", "True"], done.stderr
    assert not any(machine.server(name).token in machine.printed for name in ("prefect", "ray"))


def test_deploy_registers_the_recipe_and_every_node_with_its_form(machine: Machine) -> None:
    printed = machine.deploy(TINY)
    assert "cron 0 2 * * * (Europe/Berlin), until good-select" in printed
    whole = machine.deployment("recipe/tiny")
    names = {d["name"] for d in machine.api("POST", "deployments/filter", {})}
    assert names == {"tiny", "tiny-good-select", "tiny-more-download"}
    assert whole["work_pool_name"] == "local" and machine.api("GET", "work_pools/local")["type"] == "process"
    assert {"recipe:tiny", "trial"} <= set(whole["tags"])
    assert whole["global_concurrency_limit"]["limit"] == 1
    assert whole["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    (schedule,) = whole["schedules"]
    assert schedule["schedule"]["cron"] == "0 2 * * *" and schedule["schedule"]["timezone"] == "Europe/Berlin"
    assert schedule["parameters"] == {"nodes": {"until": "good-select"}}
    assert machine.api("GET", "v2/concurrency_limits/gpu")["limit"] == 4

    form = whole["parameter_openapi_schema"]["properties"]
    assert form["nodes"]["properties"]["only"]["items"]["enum"] == ["good-select", "more-download"]
    (accepted,), shown = form["config"]["allOf"], form["config"]["anyOf"][1]["properties"]
    width = accepted["properties"]["good-select"]["properties"]["min_width"]
    assert width["default"] == 256 and width["description"] == "pixels" and width["anyOf"][0]["minimum"] == 1
    assert set(shown["good-select"]["properties"]) == {"metadata", "min_width"}
    node = machine.deployment("node/tiny-good-select")["parameter_openapi_schema"]["properties"]
    assert node["config"]["anyOf"][1]["properties"]["min_width"]["default"] == 256 and node["follow"]["type"] == "boolean"
    assert "select" in machine.deployment("node/tiny-good-select")["tags"]


def test_another_user_of_the_server_and_the_store_does_not_take_the_deployment(machine: Machine) -> None:
    theirs = machine.folder / "theirs" / "tiny.yaml"
    write_metadata(theirs.parent / "metadata" / "part-0.parquet", first=300)
    theirs.parent.joinpath("tiny.yaml").write_text(TINY)
    code, printed = start("deploy", theirs, "--store", machine.store).finish()
    assert code == 2 and printed.count("\n") == 1 and printed.endswith("--replace\n"), printed
    assert f"of {machine.folder / 'tiny.yaml'} with" in printed and "cron 0 2 * * * (Europe/Berlin)" in printed
    assert machine.deployment("recipe/tiny")["schedules"]


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"config": {"good-select": {"min_width": 0}}}, "config['good-select'].min_width"),
        ({"config": {"good-select": {"min_wide": 3}}}, "config['good-select']"),
        ({"nodes": {"only": ["best-select"]}}, "nodes.only"),
        ({"jobs": 0}, "jobs"),
    ],
)
def test_a_wrong_parameter_is_refused_with_the_name_of_its_field(machine: Machine, parameters: Any, field: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        machine.begin("recipe/tiny", **parameters)
    assert refusal.value.code == 409
    assert field in json.loads(refusal.value.read())["detail"]


def test_what_json_schema_cannot_refuse_fails_the_run_in_one_line(machine: Machine) -> None:
    run = machine.begin("recipe/tiny", overrides=["subsets.good.select.min_wide=3"])
    assert machine.end(run) == ("FAILED", "subsets.good.select.min_wide: unknown field")


@pytest.fixture(scope="module")
def dead_run(machine: Machine) -> str:
    """A run that said that it is alive, and whose process and worker are no more; the patience with it alone is some seconds."""
    tomorrow = {"type": "SCHEDULED", "state_details": {"scheduled_time": (datetime.now(UTC) + timedelta(days=1)).isoformat()}}
    # Of a node, whose slot is not the recipe's: leaving a Running that it was put in by hand gives back a slot it never had.
    run = machine.begin("node/tiny-good-select", tomorrow)
    machine.api("POST", f"flow_runs/{run}/set_state", {"state": {"type": "RUNNING"}, "force": True})
    resource = {"prefect.resource.id": f"prefect.flow-run.{run}"}
    mark = next(a for a in machine.api("POST", "automations/filter", {}) if "mark runs" in a["name"])
    signs = {"prefect.flow-run.Running", "prefect.flow-run.heartbeat"}
    assert mark["trigger"]["within"] == 3 * HEARTBEAT_SECONDS and {*mark["trigger"]["after"]} == signs
    # It waits for the first attempt alone: the second one says only every half a minute that it is alive.
    last = "last-heartbeat-of-the-first-attempt"
    impatient = {**mark["trigger"], "after": [last], "match": resource, "within": 12}
    machine.api("POST", "automations/", {"name": "impatient", "trigger": impatient, "actions": mark["actions"]})
    flow = machine.api("GET", f"flow_runs/{run}")["flow_id"]
    related = [{"prefect.resource.id": f"prefect.flow.{flow}", "prefect.resource.role": "flow", "prefect.resource.name": "node"}]
    said = {"id": str(uuid4()), "event": last, "occurred": datetime.now(UTC).isoformat(), "resource": resource}
    machine.api("POST", "events", [{**said, "related": related}])
    return run


# Holds the slots of a node with as many workers as the first argument says, for as many seconds as the second.
HOLDER = """
import sys, threading, time
from types import SimpleNamespace
from pipelines.flows.slots import gpu_slots
node = SimpleNamespace(stage="train", config=SimpleNamespace(workers=int(sys.argv[1])))
with gpu_slots(node, threading.Event(), lambda slots: print("waiting for", slots, flush=True)):
    print("holding", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def waiting(machine: Machine) -> Iterator[subprocess.Popen[str]]:
    """A node that wants 2 of the 4 GPU slots, of which another one that is dead holds 3."""
    environment = {**os.environ, **prefect_environment(machine.store / ".state", machine.address)}

    def hold(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    with hold("3", "600") as dead:
        assert dead.stdout is not None and dead.stdout.readline() == "holding\n"
        assert machine.api("GET", "v2/concurrency_limits/gpu")["active_slots"] == 3
        with hold("2", "0") as second:
            assert second.stdout is not None and second.stdout.readline() == "waiting for 2\n"
            dead.kill()
            yield second
            second.kill()


def test_a_run_with_a_changed_field_makes_that_and_the_next_run_waits_for_it(
    machine: Machine, dead_run: str, waiting: subprocess.Popen[str]
) -> None:
    changed = {"nodes": {"only": ["good-select"]}, "config": {"good-select": {"min_width": 300}}}
    first = machine.begin("recipe/tiny", **changed)
    wait_for(lambda: "Running" in machine.states(first))
    second = machine.begin("recipe/tiny", **changed)
    wait_for(lambda: "AwaitingConcurrencySlot" in machine.states(second))
    assert machine.api("GET", f"flow_runs/{first}")["state"]["type"] not in ENDS, "the second did not wait for the first"
    assert machine.end(first) == ("COMPLETED", "1 datasets made, 0 reused")
    assert machine.rows(TINY, "good-select", "subsets.good.select.min_width=300") == 40
    assert machine.end(second) == ("COMPLETED", "nothing new: all 1 nodes reused")
    assert machine.api("GET", f"flow_runs/{second}")["name"] == "min_width 300"


def test_a_run_whose_process_died_is_marked_and_started_again(machine: Machine, dead_run: str) -> None:
    wait_for(lambda: "RetryingAfterCrash" in machine.states(dead_run))
    names = machine.states(dead_run)
    assert names.index("Running") < names.index("Crashed") < names.index("RetryingAfterCrash")
    assert machine.end(dead_run) in (("COMPLETED", "1 datasets made, 0 reused"), ("COMPLETED", "nothing new: all 1 nodes reused"))


def test_a_schedule_does_only_the_new_files_work_and_a_new_dataset_triggers_the_next_recipe(machine: Machine) -> None:
    machine.deploy(AFTER)
    machine.deploy(NIGHTLY)
    messages = lambda: [run["state"]["message"] for run in machine.runs("nightly")]  # noqa: E731
    wait_for(lambda: "nothing new: all 1 nodes reused" in messages())
    assert messages()[0] == "1 datasets made, 0 reused"
    # It ends before there is more to select: else it may be the one that selects that.
    triggered = wait_for(lambda: machine.runs("after"))
    assert machine.end(triggered[0]["id"]) == ("COMPLETED", "nothing new: all 1 nodes reused")
    units = {path.parent.name: path.stat().st_mtime_ns for path in (machine.store / "select" / "units").glob("*/*/unit.json")}
    write_metadata(machine.folder / "grown" / "part-1.parquet", first=60)
    wait_for(lambda: messages().count("1 datasets made, 0 reused") == 2)
    assert machine.rows(NIGHTLY, "grown-select") == 88
    after = {path.parent.name: path.stat().st_mtime_ns for path in (machine.store / "select" / "units").glob("*/*/unit.json")}
    assert units.items() <= after.items(), "a finished unit was done again"
    quiet = machine.deploy(NIGHTLY.replace("interval: 8", "interval: 8, active: false").replace("grown:", "other:"))
    assert "nightly-grown-select: removed" in quiet

    (event, *_) = machine.api("POST", "events/filter", {"filter": {"event": {"name": ["unidiffuser.dataset.committed"]}}})[
        "events"
    ]
    assert {"stage", "node", "fingerprint", "rows"} <= set(event["payload"])


TOLD = """
name: told
subsets:
  good: {select: {metadata: [metadata/*.parquet], min_width: 256}}
deploy: {notify: [custom-webhook/pager]}
"""


@pytest.fixture
def pager() -> Iterator[tuple[str, list[Any]]]:
    """A webhook on loopback, and what it was sent."""
    sent: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", sent
        server.shutdown()


def test_a_block_is_told_of_a_run_that_fails_and_one_that_is_not_there_is_one_line(
    machine: Machine, pager: tuple[str, list[Any]]
) -> None:
    address, sent = pager
    code, printed = start("deploy", machine.recipe(TOLD), "--store", machine.store).finish()
    assert code != 0 and printed.splitlines() == [
        "error: deploy.notify.0: custom-webhook/pager is not on the Prefect server; make it there under Blocks, or name another "
        "one as TYPE/NAME"
    ]
    # The server knows blocks of this type from now on, as somebody who makes one in the UI needs.
    kind = machine.api("GET", "block_types/slug/custom-webhook")["id"]
    (schema, *_) = machine.api("POST", "block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind]}}})
    data = {
        "name": "pager",
        "url": address,
        "allow_private_urls": True,
        "json_data": {"subject": "{{subject}}", "body": "{{body}}"},
    }
    body = {"name": "pager", "block_type_id": kind, "block_schema_id": schema["id"], "data": data}
    machine.api("POST", "block_documents/", body)
    machine.deploy(TOLD)
    run = machine.begin("recipe/told", overrides=["subsets.good.select.min_width=0"])
    ended, message = machine.end(run)
    told = wait_for(lambda: sent, 60)
    assert ended == "FAILED" and told[0]["subject"] == "told: Failed" and message in told[0]["body"]
    mine = [a for a in machine.api("POST", "automations/filter", {}) if a["name"].startswith("told: ")]
    assert sorted(a["name"] for a in mine) == ["told: tell of runs that crashed", "told: tell of runs that failed"]
    machine.deploy(TOLD.replace("{notify: [custom-webhook/pager]}", "{tags: [quiet]}"))
    assert not [a for a in machine.api("POST", "automations/filter", {}) if a["name"].startswith("told: ")]


def test_a_node_gets_the_gpu_slots_that_a_dead_one_held(machine: Machine, waiting: subprocess.Popen[str]) -> None:
    said, _ = waiting.communicate(timeout=300)
    assert said == "holding\n"
    assert machine.api("GET", "v2/concurrency_limits/gpu")["active_slots"] == 0


def test_run_makes_one_deployment_of_a_recipe_that_has_none_and_a_cancel_in_the_ui_stops_the_ray_job(machine: Machine) -> None:
    def deployed() -> set[str]:
        return {deployment["name"] for deployment in machine.api("POST", "deployments/filter", {})}

    before = deployed()
    command = start(
        "run",
        machine.recipe(TINY),
        "--set",
        "name=tried",
        "--only",
        "good-select",
        "--store",
        machine.store,
        "--set",
        "subsets.good.select.min_width=350",
    )
    run = command.read_until("This run in the Prefect UI: ").rsplit("/", 1)[-1].strip()
    node = plan(load_recipe(machine.recipe(TINY), ["subsets.good.select.min_width=350"]), Store(str(machine.store)))[
        "good-select"
    ]
    job, ray = f"good-select-{node.fingerprint}-1", machine.server("ray")
    jobs = RayJobs(ray.address, ray.token)
    wait_for(lambda: jobs.statuses().get(job) == "RUNNING")
    whole = machine.deployment("recipe/tried")
    assert machine.api("GET", f"flow_runs/{run}")["deployment_id"] == whole["id"], "no Retry in the UI"
    assert deployed() == {*before, "tried"} and not whole["schedules"]
    machine.api("POST", f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    code, printed = command.finish()
    assert code == 130 and re.search(r"good-select {2,}stopped", printed), printed
    assert jobs.statuses()[job] == "STOPPED"
    assert machine.end(run)[0] == "CANCELLED"

    # The worker has its word on a cancel some seconds after the run itself, and would cancel the retry with it.
    wait_for(lambda: machine.states(run).count("Cancelled") == 2, 60)
    # Retry in the UI.
    machine.api("POST", f"flow_runs/{run}/set_state", {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True})
    wait_for(lambda: machine.states(run).count("Running") == 2)
    assert machine.end(run) == ("COMPLETED", "1 datasets made, 0 reused")
    assert machine.rows(TINY, "good-select", "subsets.good.select.min_width=350") == 35
    code, printed = start("undeploy", "tried", "--store", machine.store).finish()
    assert code == 0 and printed == f"tried: removed\nwhat it has made stays in {machine.store}\n" and deployed() == before


def test_up_starts_a_dead_worker_again_and_down_interrupts_its_run_and_leaves_nothing(machine: Machine) -> None:
    names = ("prefect", "ray", "worker")
    worker = machine.server("worker")
    psutil.Process(worker.pid).kill()
    code, printed = start("run", machine.recipe(TINY), "--store", machine.store).finish()
    assert code == 1 and "the worker that `unidiffuser up` started is dead; run `unidiffuser up` again" in printed
    code, printed = start("up", "--store", machine.store).finish()
    assert code == 0 and printed.count("was running") == 2 and machine.server("worker").pid != worker.pid

    servers = [machine.server(name) for name in names]
    width = "subsets.good.select.min_width=400"
    before = len(machine.runs("tiny"))
    command = start("run", machine.recipe(TINY), "--only", "good-select", "--store", machine.store, "--set", width)
    command.read_until("pick")
    assert len(machine.runs("tiny")) == before + 1, "not a run of the recipe's deployment"
    code, printed = start("down", "--store", machine.store).finish()
    assert code == 0 and "interrupting a run" in printed
    command.finish(signal.SIGKILL)
    assert survivors(machine.store) == []
    assert not any(psutil.pid_exists(server.pid) for server in servers)
    for server in servers[:2]:
        host, port = server.address.removeprefix("http://").split(":")
        with socket.socket() as sock:
            assert sock.connect_ex((host, int(port))) != 0, f"something listens on the port of {server.name}"
    code, printed = start("down", "--store", machine.store).finish()
    assert code == 0 and "nothing was up" in printed
    code, printed = start("deploy", machine.recipe(TINY), "--store", machine.store).finish()
    assert code == 1 and printed.startswith("error: no Prefect server to deploy to; `unidiffuser up` starts one")
