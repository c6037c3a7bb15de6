"""A run of a recipe's deployment, started from the terminal and followed there through Prefect alone."""

from __future__ import annotations

import logging
import re
import time
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
    LogFilterLevel,
    LogFilterTimestamp,
)
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, State

from infra.dataset import find
from infra.prefect_server import answers
from pipelines.flows.deployed import DEBUGGED, RETRYING, deployed_recipe
from pipelines.flows.flow import JOB_LOGGER, read_logs
from pipelines.flows.names import name_of_changes
from pipelines.flows.parameters import Choice, values_of
from pipelines.flows.run import Outcome, Result, Run, plan_run, snapshot
from pipelines.flows.stopping import stop_on_signals
from pipelines.pages.progress import read_progress
from pipelines.servers.deployments import check_addresses, register_trial
from pipelines.servers.owners import Owner

TICK = 1.0
# How long the server may take to start a crashed run again, in seconds.
RETRY_SECONDS = 60.0
# How much later than a later line a line may come to the server: processes send theirs in batches of their own.
LATE = timedelta(seconds=60)

RESULTS: dict[StateType, Result] = {StateType.FAILED: "failed", StateType.CRASHED: "failed", StateType.CANCELLED: "stopped"}
NOTES = {
    "AwaitingConcurrencySlot": "waits: another run of this recipe is going on",
    "Late": "waits for the worker",
    "Crashed": "its process died",
    RETRYING: "is started again",
    "Cancelling": "is being cancelled; its job stops after a last checkpoint",
}
# Prefect leaves a random suffix on the name of a task that it never began.
_SUFFIX = re.compile(r"-[0-9a-f]{3}$")


def start_run(run: Run, chosen: Choice, overrides: list[str]) -> UUID:
    """Start a run of the recipe's deployment; a recipe that has none gets one for its runs, without schedules."""
    check_addresses(run.recipe)
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(f"recipe/{run.recipe.name}")
            deployment, plain = found.id, deployed_recipe(found.parameters)
            _say_whose(run, Owner.read(found))
        except ObjectNotFound:
            deployment, plain = register_trial(run.recipe, run.store), None
        parameters = {
            "recipe": snapshot(run.recipe, run.store),
            "store": run.store.root,
            "nodes": chosen.model_dump(by_alias=True, exclude_defaults=True),
            "config": values_of(run.recipe, run.nodes),
            "overrides": overrides,
            "jobs": run.jobs,
        }
        # The recipe has been checked, and may have other nodes and fields by now than the form of its deployment.
        name = (plain and name_of_changes(plain, run.recipe, run.nodes)) or run.recipe.name
        body: dict[str, Any] = {"name": name, "parameters": parameters, "enforce_parameter_schema": False}
        if run.debug:
            body["labels"] = {DEBUGGED: True}
        reply = client.request("POST", "/deployments/{id}/create_flow_run", path_params={"id": deployment}, json=body)
        return UUID(reply.json()["id"])


def _say_whose(run: Run, owner: Owner | None) -> None:
    """Two recipes of one name share a history, and wait for each other."""
    if run.recipe.file and owner is not None and owner != Owner.of(run.recipe, run.store):
        run.view.said(run.recipe.name, logging.WARNING, f"runs beside those of another recipe of this name, {owner}")


def follow(run: Run, flow_run: UUID) -> State[Any]:
    """Show a run as it goes, until it has ended; Ctrl-C cancels it. The outcomes are in `run`."""
    run.flow_run = str(flow_run)
    with get_client(sync_client=True) as client, stop_on_signals(run):
        follower = _Follower(run, client, flow_run)
        cancelled = False
        while (state := follower.look()) is None:
            # Here and not in the signal's handler, which may have interrupted another request.
            if run.stopping.is_set() and not cancelled:
                run.view.said(run.recipe.name, logging.WARNING, "cancelling the run; Ctrl-C again: do not wait for that")
                client.set_flow_run_state(flow_run, Cancelling(message="cancelled from the terminal"))
                cancelled = True
            time.sleep(TICK)
        follower.close(state)
        return state


class _Follower:
    """Reads a flow run's state, tasks, warnings and progress, and tells the run's view what is new."""

    def __init__(self, run: Run, client: SyncPrefectClient, flow_run: UUID):
        self.run, self.client, self.flow_run = run, client, flow_run
        self.newest: datetime | None = None
        self.heard: set[UUID] = set()
        self.begun: set[str] = set()
        self.reported: dict[str, str] = {}
        self.name = ""
        self.patience = 0.0

    def look(self) -> State[Any] | None:
        """The final state, once there is one."""
        try:
            state = self.client.read_flow_run(self.flow_run).state
            if state is None or not self._settled(state):
                self._tell(state)
                return None
            self._tell(state)
            return state
        except Exception as error:
            # A server that is starting again must not end the following.
            if answers(str(self.client.api_url).rstrip("/").removesuffix("/api")):
                raise
            self._note("no-answer", f"the Prefect server does not answer: {error}")
            return None

    def _settled(self, state: State[Any]) -> bool:
        """A crashed run may be started again by the server; wait for that a while."""
        if not state.is_crashed() or not self.run.recipe.deploy.crash_retries or self.run.stopping.is_set():
            return state.is_final()
        self.patience = self.patience or time.monotonic()
        return time.monotonic() - self.patience > RETRY_SECONDS

    def _tell(self, state: State[Any] | None) -> None:
        name = state.name if state is not None and state.name else ""
        if name in NOTES:
            self._note(name, NOTES[name])
        if state is not None and not state.is_crashed():
            self.patience = 0.0
        tasks = self._tasks()
        self._warnings({task.id: node for node, task in tasks.items()})
        for node, task in tasks.items():
            if task.state is not None and task.state.is_running() and node not in self.begun:
                self.begun.add(node)
                self.run.view.started(node)
            if task.state is not None and task.state.is_final() and node not in self.run.outcomes:
                self._finish(node, task)
        self._progress()

    def _note(self, name: str, text: str) -> None:
        if name != self.name:
            self.run.view.said(self.run.recipe.name, logging.WARNING, text)
        self.name = name

    def _tasks(self) -> dict[str, TaskRun]:
        """The last attempt at each node."""
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[self.flow_run]))
        found = sorted(
            self.client.read_task_runs(flow_run_filter=mine), key=lambda task: task.created.timestamp() if task.created else 0
        )
        return {_SUFFIX.sub("", task.name) if task.name not in self.run.nodes else task.name: task for task in found}

    def _finish(self, node: str, task: TaskRun) -> None:
        if not self.run.outcomes:
            # What was forced has its new fingerprint by now.
            self.run.planned = plan_run(self.run.recipe, self.run.store)
        planned, state = self.run.planned[node], task.state
        assert state is not None
        if not state.is_completed():
            self.run.finish(Outcome(node, RESULTS[state.type], task.total_run_time.total_seconds(), message=state.message or ""))
            return
        dataset = find(self.run.store, planned.stage, planned.fingerprint)
        if made := re.fullmatch(r"made in ([\d.]+) s", state.message or ""):
            self.run.finish(Outcome(node, "made", float(made[1]), dataset))
        else:
            self.run.finish(Outcome(node, "reused", task.total_run_time.total_seconds(), dataset))

    def _progress(self) -> None:
        filters = ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[self.flow_run]), type=ArtifactFilterType(any_=["progress"])
        )
        for artifact in self.client.read_artifacts(artifact_filter=filters):
            node, fields = read_progress(artifact.description or "")
            if node in self.begun and node not in self.run.outcomes and self.reported.get(node) != artifact.description:
                self.reported[node] = artifact.description or ""
                self.run.view.progress(node, fields)

    def _warnings(self, nodes: dict[UUID, str]) -> None:
        """What the jobs have said; Prefect's own lines repeat what the states say."""
        mine = LogFilter(
            flow_run_id=LogFilterFlowRunId(any_=[self.flow_run]),
            level=LogFilterLevel(ge_=logging.WARNING),
            timestamp=LogFilterTimestamp(after_=self.newest - LATE) if self.newest else None,
        )
        for line in read_logs(self.client, mine):
            self.newest = max(self.newest or line.timestamp, line.timestamp)
            # A line of a task that the server does not know yet is heard later.
            if line.name == JOB_LOGGER and line.task_run_id in nodes and line.id not in self.heard:
                self.heard.add(line.id)
                self.run.view.said(nodes[line.task_run_id], line.level, line.message)

    def close(self, state: State[Any]) -> None:
        """Nodes that the run did not come to; and what ended it when no node did."""
        for node in self.run.nodes:
            if node not in self.run.outcomes:
                self.run.finish(Outcome(node, "not run"))
        if not state.is_completed() and not state.is_cancelled() and not self.run.failures() and state.message:
            self.run.view.said(self.run.recipe.name, logging.ERROR, state.message)
