"""What a deployment's run makes of its parameters, of the attempts before it, and of jobs that it finds; without any server."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from httpx import ConnectError
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, Running, State

from infra.processes import ServerError
from infra.store import Store
from pipelines.flows import deployed, flow
from pipelines.flows.jobs import ATTACHED, FLOW_RUN, SUBMITTED, make_as_job, stop_jobs_of, stop_orphans, tidy
from pipelines.flows.parameters import values_of
from pipelines.flows.run import Run, plan_run, snapshot
from pipelines.servers import follow
from pipelines.servers.machine import find_machine
from pipelines.servers.servers import KEPT, Servers
from stages.runner.recipe import Recipe, load_recipe
from tests.infra.test_servers import standing

NODE = "good-select"


class Client:
    """The few questions of a Prefect server that these tests need, with the answers that they lay down."""

    def __init__(self) -> None:
        self.logs: list[Any] = []
        self.flow_runs: dict[UUID, Any] = {}
        self.states: list[State[Any]] = []
        self.labels: dict[str, Any] = {}

    def read_logs(self, wanted: Any, offset: int = 0, sort: Any = None) -> list[Any]:
        after = wanted.timestamp.after_ if wanted.timestamp else None
        mine = [line for line in self.logs if line.flow_run_id in wanted.flow_run_id.any_]
        lines = [line for line in mine if after is None or line.timestamp >= after]
        return sorted(lines, key=lambda line: line.timestamp)[offset:][:2]

    def read_flow_run(self, flow_run: UUID) -> Any:
        if flow_run not in self.flow_runs:
            raise ObjectNotFound(Exception())
        if isinstance(found := self.flow_runs[flow_run], Exception):
            raise found
        return found

    def read_flow_run_states(self, flow_run: UUID) -> list[State[Any]]:
        return self.states

    def update_flow_run_labels(self, flow_run: UUID, labels: dict[str, Any]) -> None:
        self.labels |= labels


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()

    @contextmanager
    def get_client(sync_client: bool) -> Iterator[Client]:
        yield client

    for module in (deployed, flow):
        monkeypatch.setattr(module, "get_client", get_client)
    return client


class Ray:
    """Jobs by id; each has said `lines` by now, and ends when they have been heard."""

    def __init__(self, lines: Sequence[str] = (), **owners: str | None) -> None:
        self.lines = lines
        self.jobs = {job.replace("_", "-"): "RUNNING" for job in owners}
        self.metadata = {job.replace("_", "-"): {FLOW_RUN: owner} if owner else {} for job, owner in owners.items()}
        self.submitted: list[tuple[str, Any, str | None]] = []

    def running(self, before: float = 0.0) -> dict[str, dict[str, str]]:
        return {job: self.metadata[job] for job, status in self.jobs.items() if status == "RUNNING"}

    def statuses(self) -> dict[str, str]:
        return self.jobs

    def status(self, job: str) -> str:
        return self.jobs[job]

    def lost(self, job: str) -> bool:
        return job not in self.jobs

    def ready(self) -> bool:
        return True

    def submit(self, job: str, command: str, environment: Any, metadata: dict[str, str], folder: str | None = None) -> None:
        self.submitted.append((command, environment, folder))
        self.jobs[job], self.metadata[job] = "RUNNING", metadata

    def stop(self, job: str) -> None:
        self.jobs[job] = "STOPPED"

    def follow(self, job: str) -> Iterator[str]:
        yield from self.lines
        self.jobs[job] = "SUCCEEDED"

    def log(self, job: str, patient: bool = True) -> str:
        for line in self.lines:
            if isinstance(line, ServerError):
                raise line
        return "\n".join(self.lines)


def a_run(recipe: Recipe, store: Store, ray: Any = None, flow_run: UUID | None = None) -> Run:
    servers = Servers(recipe.folder)
    servers.ray = lambda: ray  # type: ignore[method-assign]
    run = Run(recipe, store, plan_run(recipe, store), list(recipe.nodes), servers, deployed.Unwatched())
    run.flow_run = str(flow_run) if flow_run else None
    return run


def a_line(flow_run: UUID, text: str, second: float, task: UUID | None = None, level: int = logging.INFO, name: str = "") -> Any:
    return SimpleNamespace(
        id=uuid4(), flow_run_id=flow_run, task_run_id=task, level=level, message=text, name=name or flow.JOB_LOGGER,
        timestamp=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=second),
    )  # fmt: skip


def attached_again(run: Run, client: Client, second: float) -> list[str]:
    """What a new process of the run sends to Prefect of its node's job; it arrives there."""
    task, sent = uuid4(), []

    class Logger:
        def log(self, level: int, form: str, text: str) -> None:
            sent.append(text)

    log = flow._JobLog(run, NODE, Logger())
    make_as_job(run, run.planned[NODE], log.say, lambda fields: None, log.attached)
    client.logs += [a_line(UUID(str(run.flow_run)), text, second + n, task) for n, text in enumerate(sent)]
    return sent


def test_a_log_that_cannot_be_read_is_a_warning_and_its_node_is_made(recipe: Recipe, store: Store) -> None:
    lost: Any = ServerError("the log of the job x cannot be read")
    run, said = a_run(recipe, store, Ray([lost, "INFO goes on"])), []
    make_as_job(run, run.planned[NODE], lambda level, text: said.append((level, text)), lambda fields: None, lambda job: None)
    assert said[1:] == [(logging.WARNING, str(lost)), (logging.INFO, "goes on")]


def test_a_run_that_attaches_to_its_job_again_sends_each_line_once(recipe: Recipe, store: Store, client: Client) -> None:
    said = ["INFO one", "INFO again", "INFO again", "WARNING three", "INFO again", "last"]
    ray = Ray(said[:3])
    run = a_run(recipe, store, ray, uuid4())
    job = f"{NODE}-{run.planned[NODE].fingerprint}-1"
    assert attached_again(run, client, 0) == [SUBMITTED.format(job), "one", "again", "again"]
    assert ray.metadata[job] == {FLOW_RUN: run.flow_run}
    # The process dies before the third line is sent, and comes back when the job has said some more.
    client.logs.pop()
    ray.jobs[job], ray.lines = "RUNNING", said[:5]
    assert attached_again(run, client, 100) == [ATTACHED.format(job), "again", "three", "again"]
    for line in client.logs:
        line.level = logging.WARNING if line.message == "three" else logging.INFO
    ray.jobs[job], ray.lines = "RUNNING", said
    assert attached_again(run, client, 200) == [ATTACHED.format(job), "last"]
    # Another run has none of these lines, and another job of this run may well say the same.
    ray.jobs[job] = "RUNNING"
    assert len(attached_again(a_run(recipe, store, ray, uuid4()), client, 300)) == 1 + len(said)
    ray.jobs[job] = "FAILED"
    assert len(attached_again(run, client, 400)) == 1 + len(said)
    # None of the other job's lines has arrived.
    del client.logs[-len(said) :]
    ray.jobs[job], ray.jobs[job[:-1] + "2"] = "FAILED", "RUNNING"
    assert len(attached_again(run, client, 500)) == 1 + len(said)


def test_only_jobs_that_no_run_will_come_back_to_are_orphans(recipe: Recipe, store: Store, client: Client) -> None:
    now = datetime.now(UTC)
    mine, running, crashed, long_ago, ended, command, unsaid, stateless = (uuid4() for _ in range(8))
    client.flow_runs = {
        mine: SimpleNamespace(state=Running(), deployment_id=uuid4()),
        running: SimpleNamespace(state=Running(), deployment_id=uuid4()),
        crashed: SimpleNamespace(state=Crashed(timestamp=now - timedelta(minutes=1)), deployment_id=uuid4()),
        long_ago: SimpleNamespace(state=Crashed(timestamp=now - timedelta(minutes=3)), deployment_id=uuid4()),
        ended: SimpleNamespace(state=Cancelled(), deployment_id=uuid4()),
        command: SimpleNamespace(state=Running(), deployment_id=None),
        stateless: SimpleNamespace(state=None, deployment_id=uuid4()),
        # The server is starting again: a job is stopped only where it is known that nobody comes back to it.
        unsaid: ConnectError("nobody there"),
    }
    owners = {"mine": mine, "running": running, "crashed": crashed, "old": long_ago, "ended": ended, "command": command}
    owners |= {"unsaid": unsaid, "stateless": stateless}
    ray = Ray(**{f"{name}_f_1": str(owner) for name, owner in owners.items()}, unknown_f_1=str(uuid4()), bare_f_1=None)
    planned = plan_run(recipe, store)
    wanted = f"{NODE}-{planned[NODE].fingerprint}-1"
    ray.jobs[wanted], ray.metadata[wanted] = "RUNNING", {}
    stop_orphans(ray, planned, 0.0, lambda *_: None, lambda owner: deployed._goes_on(mine, owner))  # type: ignore[arg-type]
    assert sorted(ray.running()) == sorted(["crashed-f-1", "running-f-1", "unsaid-f-1", wanted])
    # What a command finds where nobody else uses the servers has lost its own.
    stop_orphans(ray, planned, 0.0, lambda *_: None)  # type: ignore[arg-type]
    assert list(ray.running()) == [wanted]


def test_what_a_killed_command_left_on_a_cluster_of_many_users_is_named_and_goes_on(recipe: Recipe, store: Store) -> None:
    planned = plan_run(recipe, store)
    said: list[str] = []
    there = f"python -m stages {store.root}/.state/recipes/{recipe.name}-0123456789ab.json {NODE} --store {store.root}"
    commands = {
        f"{NODE}-{planned[NODE].fingerprint}-1": there,
        f"{NODE}-{'0' * 24}-2": there,
        "theirs-1": there.replace(store.root, "s3://another/store"),
        "another-1": there.replace(f"{recipe.name}-", "another-"),
        "by-hand-1": "sleep 60",
    }
    ray = SimpleNamespace(commands=lambda: commands, address="http://head:8265")
    run = SimpleNamespace(recipe=recipe, store=store, planned=planned, servers=SimpleNamespace(embedded_ray=False))
    tidy(ray, run, lambda level, text: said.append(text))  # type: ignore[arg-type]
    (line,) = said
    assert f"{NODE}-{'0' * 24}-2 of an earlier run" in line and "ray job stop --address http://head:8265" in line


def test_a_cancelled_run_s_jobs_are_found_whatever_its_files_have_become(client: Client) -> None:
    ray = Ray(good_select_f_1="ours", good_select_g_1="theirs", other_f_1=None)
    assert stop_jobs_of(ray, "ours") == ["good-select-f-1"]  # type: ignore[arg-type]
    assert sorted(ray.running()) == ["good-select-g-1", "other-f-1"]


def width(parameters: dict[str, Any], store: Store) -> tuple[int, int]:
    config: Any = deployed._asked(parameters, store)[0].nodes[NODE].config
    return config.min_width, config.min_height


def test_in_a_copy_of_a_run_fields_and_overrides_can_be_edited(recipe: Recipe, store: Store) -> None:
    overrides = ["subsets.good.select.min_width=300", "subsets.good.select.min_height=310"]
    begun = load_recipe(recipe.folder / "tiny.yaml", overrides)
    parameters = {
        "recipe": snapshot(begun, store),
        "config": values_of(begun, [NODE]),
        "overrides": overrides,
    }
    assert width(parameters, store) == (300, 310)
    assert width({**parameters, "overrides": ["subsets.good.select.min_width=400", overrides[1]]}, store) == (400, 310)
    edited = {NODE: {**parameters["config"][NODE], "min_height": 420}}  # type: ignore[index]
    assert width({**parameters, "config": edited}, store) == (300, 420)
    # Of two that contradict each other, the override wins.
    form = {"recipe": str(recipe.folder / "tiny.yaml"), "config": {NODE: {"min_width": 500, "min_height": 510}}}
    assert width({**form, "overrides": ["subsets.good.select.min_width=600"]}, store) == (600, 510)
    assert width({**form, "node": NODE, "config": form["config"][NODE], "overrides": []}, store) == (500, 510)  # type: ignore[index]


def test_a_nodes_form_can_start_what_follows_from_it(recipe: Recipe, store: Store) -> None:
    follows = (
        "subsets={good: {select: {metadata: ['metadata/*.parquet']}, download: {}}, other: {from: good-download, filter: {}}}"
    )
    form: dict[str, Any] = {
        "recipe": snapshot(load_recipe(recipe.folder / "tiny.yaml", [follows]), store),
        "node": "good-download",
    }
    assert deployed._asked({**form, "config": None}, store)[1:] == (["good-download"], [])
    assert deployed._asked({**form, "follow": True, "force": True}, store)[1:] == (
        ["good-download", "other-filter"],
        ["good-download"],
    )


def test_a_run_is_named_by_what_differs_from_the_deployments_recipe(recipe: Recipe, store: Store) -> None:
    plain = {"recipe": str(recipe.folder / "tiny.yaml")}
    client: Any = SimpleNamespace(read_deployment=lambda deployment: SimpleNamespace(parameters=deployment))
    wider = load_recipe(plain["recipe"], ["subsets.good.select.min_width=300"])
    for given, asked, name in (
        (plain, recipe, "tiny"),
        (plain, wider, "min_width 300"),
        ({**plain, "node": NODE}, recipe, NODE),
        ({**plain, "node": NODE}, wider, "min_width 300"),
        # A copy of the recipe that is gone from the store.
        ({"recipe": str(recipe.folder / "gone.json")}, wider, "tiny"),
    ):
        run: Any = SimpleNamespace(deployment_id=given)
        assert deployed._name(client, run, asked, [NODE]) == name


def test_an_attempt_that_died_before_it_forced_anything_leaves_that_to_the_next_and_no_other_forces_again(
    recipe: Recipe, store: Store, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = SimpleNamespace(begin_ray=lambda tidy: None, since=0.0)
    monkeypatch.setattr(deployed, "use_servers", contextmanager(lambda state: iter([servers])))
    parameters = {"recipe": str(recipe.folder / "tiny.yaml"), "store": store.root, "nodes": {"force": [NODE]}}
    for attempt in (2, 3):
        client.states = [Running()] * attempt
        labels = client.labels | ({deployed.DEBUGGED: True} if attempt == 3 else {})
        flow_run: Any = SimpleNamespace(id=uuid4(), run_count=attempt, labels=labels, name="tiny")
        with deployed.open_run(flow_run, parameters) as run:
            assert run.planned[NODE].generation == 1 and run.debug == (attempt == 3)


def states(*names: str) -> list[State[Any]]:
    first = datetime.now(UTC)
    kinds: dict[str, Any] = {"Running": Running, "Crashed": Crashed, deployed.RETRYING: Running, "AwaitingRetry": Running}
    return [kinds[name](name=name, timestamp=first + timedelta(seconds=n)) for n, name in enumerate(names)]


def test_a_run_whose_process_dies_each_time_is_started_as_often_as_the_recipe_says(client: Client) -> None:
    died = ("Running", "Crashed", deployed.RETRYING)
    flow_run: Any = SimpleNamespace(id=uuid4())

    def check(*names: str, allowed: int = 2) -> None:
        client.states = states(*names)
        deployed._check_crashes(client, flow_run, allowed)  # type: ignore[arg-type]

    check("Running")
    check(*died, "Running")
    check(*died, *died, "Running")
    with pytest.raises(ServerError, match="the process of this run died 3 times; look at its last log lines, then use Retry"):
        check(*died, *died, *died, "Running")
    with pytest.raises(ServerError, match="died 1 times"):
        check(*died, "Running", allowed=0)
    # Somebody wants it.
    check(*died, *died, *died, "Running", "AwaitingRetry", "Running")


def test_warnings_that_come_late_are_neither_lost_nor_said_twice(recipe: Recipe, store: Store) -> None:
    heard: list[str] = []
    run = a_run(recipe, store)
    run.view.said = lambda node, level, text: heard.append(text)  # type: ignore[method-assign]
    client, flow_run, task, unknown = Client(), uuid4(), uuid4(), uuid4()
    follower = follow._Follower(run, client, flow_run)  # type: ignore[arg-type]

    def comes(text: str, second: float, task: UUID = task) -> None:
        client.logs.append(a_line(flow_run, text, second, task, logging.WARNING))

    for n in range(5):
        comes(f"warning {n}", n)
    follower._warnings({task: NODE})
    comes("late", 1.5)
    comes("of a task that is not known yet", 3, unknown)
    follower._warnings({task: NODE})
    follower._warnings({task: NODE, unknown: NODE})
    comes("hours later", 9000)
    follower._warnings({task: NODE, unknown: NODE})
    follower._warnings({task: NODE, unknown: NODE})
    assert heard == [*(f"warning {n}" for n in range(5)), "late", "of a task that is not known yet", "hours later"]


def test_a_configured_prefect_server_is_checked_also_where_up_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    monkeypatch.setenv("PREFECT_API_KEY", "expired")
    (tmp_path / KEPT).write_text("{}")
    with standing() as stand:
        monkeypatch.setenv("PREFECT_API_URL", f"{stand.address}/api")
        with pytest.raises(ServerError, match="refuses the key; set PREFECT_API_KEY"):
            find_machine(tmp_path)
