"""The Prefect side of a run: flows with one task a node, chained by futures so that the graph's edges are the data's."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, cast
from uuid import UUID

from httpx import HTTPError
from prefect import flow, get_run_logger, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import Log
from prefect.client.schemas.sorting import LogSort
from prefect.context import FlowRunContext
from prefect.events.worker import EventsWorker
from prefect.exceptions import CancelledRun, FailedRun
from prefect.futures import PrefectFuture
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from infra.dataset import find, point
from infra.prefect_server import HEARTBEAT_SECONDS
from infra.processes import ServerError
from infra.queries import unsigned
from infra.store import StoreError
from pipelines.flows.deployed import open_run, stop_left_jobs
from pipelines.flows.events import announce
from pipelines.flows.jobs import ATTACHED, SUBMITTED, NodeFailed, NodeStopped, make_as_job
from pipelines.flows.parameters import Choice, values_of
from pipelines.flows.run import Outcome, Run, snapshot
from pipelines.flows.stopping import end_runs_of_killed_commands, stop_on_cancel, stop_on_signals
from pipelines.flows.turns import tasks_in_turn
from pipelines.pages.artifacts import publish_page, publish_run_page
from pipelines.pages.progress import ProgressArtifact, TrainingArtifact
from stages.runner.contract import StageError
from stages.runner.recipe import RecipeError

# The run that the flow and its tasks are about. Prefect copies the context into its threads.
RUN: ContextVar[Run] = ContextVar("run")

# What a job says goes to the task run's log under this name, apart from what Prefect says there.
JOB_LOGGER = "prefect.task_runs.job"


@task
def make_node(node: str, inputs: dict[str, Any]) -> Any:
    """Make or reuse the dataset of one node, and publish its page. `inputs` are the results of the tasks before it."""
    run = RUN.get()
    planned = run.planned[node]
    logger: Any = get_run_logger()
    start = time.perf_counter()
    try:
        dataset = find(run.store, planned.stage, planned.fingerprint)
        reused, seconds = dataset is not None, 0.0
        if reused:
            logger.info(
                "reused %s/%s: it is committed, and nothing that decides it has changed", planned.stage, planned.fingerprint
            )
        else:
            logger.info("%s: %s", planned.state, "; ".join(planned.reasons))
            progress, training = ProgressArtifact(run, node), TrainingArtifact(run, node)

            def report(fields: dict[str, Any]) -> None:
                if "picture" not in fields:
                    progress.report(fields)
                training.report(fields)

            log = _JobLog(run, node, logger.getChild(JOB_LOGGER.rsplit(".", 1)[-1]))
            seconds = make_as_job(run, planned, log.say, report, log.attached)
            dataset = find(run.store, planned.stage, planned.fingerprint)
            if dataset is None:
                raise NodeFailed(f"the job ended well, but {planned.stage}/{planned.fingerprint} is not in {run.store.root}")
        assert dataset is not None
        point(run.store, run.recipe.name, node, dataset.manifest.reference())
        announce(run, dataset)
        outcome = Outcome(node, "reused" if reused else "made", seconds or time.perf_counter() - start, dataset)
        publish_page(run, planned, outcome)
    except NodeStopped:
        run.finish(Outcome(node, "stopped", time.perf_counter() - start))
        return Cancelled(message="stopped with the run")
    except NodeFailed as error:
        run.finish(Outcome(node, "failed", time.perf_counter() - start, message=str(error)))
        return Failed(message=str(error))
    run.finish(outcome)
    return Completed(
        message="reused" if reused else f"made in {outcome.seconds:.1f} s",
        data={"stage": planned.stage, "fingerprint": planned.fingerprint},
    )


class _JobLog:
    """What a job says, on its way to Prefect and the run's view; a job that is followed again says it all from the start."""

    def __init__(self, run: Run, node: str, logger: Any):
        self.run, self.node, self.logger = run, node, logger
        self.known: Counter[tuple[int, str]] = Counter()

    def attached(self, job: str) -> None:
        assert self.run.flow_run is not None
        # While the server is starting again, a line twice is better than no run.
        with suppress(HTTPError):
            self.known = lines_said(UUID(self.run.flow_run), job)

    def say(self, level: int, text: str) -> None:
        if self.known[level, text]:
            self.known[level, text] -= 1
            return
        self.logger.log(level, "%s", text)
        self.run.view.said(self.node, level, text)


def lines_said(flow_run: UUID, job: str) -> Counter[tuple[int, str]]:
    """Level and text of the lines of a job's log that a flow run has in Prefect, from attempts before this one.

    Counted one by one: what a process had not sent when it died, or sent while the server was down, is not among them.
    """
    first, tasks = {SUBMITTED.format(job), ATTACHED.format(job)}, set()
    found: Counter[tuple[int, str]] = Counter()
    with get_client(sync_client=True) as client:
        for line in read_logs(client, LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run]))):
            if line.name == JOB_LOGGER and line.message in first:
                tasks.add(line.task_run_id)
            elif line.name == JOB_LOGGER and line.task_run_id in tasks:
                found[line.level, line.message] += 1
    return found


def read_logs(client: SyncPrefectClient, wanted: LogFilter) -> Iterator[Log]:
    """Every line, page by page, in the order in which they were said."""
    offset = 0
    while page := client.read_logs(wanted, offset=offset, sort=LogSort.TIMESTAMP_ASC):
        yield from page
        offset += len(page)


# Every node has a thread; how many work at a time is the run's business (`Run.jobs`).
THREADS: Any = ThreadPoolTaskRunner()
EVERYTHING = Choice.model_validate({})


@flow(name="recipe", task_runner=THREADS, validate_parameters=False, on_cancellation=[stop_left_jobs])
def recipe_run(
    recipe: str,
    store: str = "runs",
    nodes: Choice = EVERYTHING,
    config: dict[str, dict[str, Any]] | None = None,
    overrides: list[str] | None = None,
    jobs: int = 1,
) -> Any:
    """Every chosen node of a recipe, as far as its inputs allow.

    Args:
        recipe: The recipe: a YAML file, or the copy that `unidiffuser deploy` made of it.
        store: Folder or fsspec URL of the datasets.
        nodes: Which nodes to run; by default all.
        config: Other values for fields of nodes, by node.
        overrides: Further fields of the recipe, as --set takes them: a.b=c.
        jobs: How many nodes work at a time.
    """
    return _conduct()


@flow(name="node", task_runner=THREADS, validate_parameters=False, on_cancellation=[stop_left_jobs])
def node_run(
    recipe: str,
    node: str,
    store: str = "runs",
    config: dict[str, Any] | None = None,
    overrides: list[str] | None = None,
    follow: bool = False,
    force: bool = False,
) -> Any:
    """One node of a recipe, from the committed datasets of the nodes before it.

    Args:
        recipe: The recipe: a YAML file, or the copy that `unidiffuser deploy` made of it.
        node: The node.
        store: Folder or fsspec URL of the datasets.
        config: Other values for fields of the node.
        overrides: Further fields of the recipe, as --set takes them: a.b=c.
        follow: Then every node that needs it.
        force: Make it again, although nothing that decides it has changed.
    """
    return _conduct()


def _conduct() -> Any:
    """The flow's run: the one that a command has prepared, or in a worker's process the one that the parameters describe."""
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None
    if (run := RUN.get(None)) is not None:
        return _walk(run, context.flow_run.id)
    logging.getLogger("prefect.flow_runs").addFilter(_no_traceback)
    try:
        with open_run(context.flow_run, context.parameters or {}) as run:
            token = RUN.set(run)
            try:
                return _walk(run, context.flow_run.id)
            finally:
                RUN.reset(token)
    except (RecipeError, StageError, StoreError, ServerError) as error:
        return Failed(message=str(error))


def _no_traceback(record: logging.LogRecord) -> bool:
    """Prefect's engine raises the final state of a run as an error of its own, and would end the log with that traceback."""
    kind = record.exc_info[0] if isinstance(record.exc_info, tuple) else None
    return kind not in (FailedRun, CancelledRun)


def _walk(run: Run, flow_run: UUID) -> State[Any]:
    """Run a task a node, each after those that make its inputs, and publish the run's page when all have ended."""
    run.flow_run = str(flow_run)
    with stop_on_signals(run), stop_on_cancel(run, flow_run):
        for node, future in tasks_in_turn(run, _submit).items():
            if node not in run.outcomes:
                run.finish(_without_outcome(node, future.state) if future else Outcome(node, "not run"))
        publish_run_page(run)
    return _final_state(run)


def _submit(node: str, inputs: dict[str, PrefectFuture[Any]]) -> PrefectFuture[Any]:
    return make_node.with_options(name=node, task_run_name=node).submit(node, inputs)


def _without_outcome(node: str, state: State[Any]) -> Outcome:
    """A task that Prefect ended itself: an input was not made, or the task broke in a way that nobody foresaw."""
    if state.is_failed() or state.is_crashed():
        return Outcome(node, "failed", message=state.message or "the task died; its log in the Prefect UI says more")
    return Outcome(node, "not run")


def _final_state(run: Run) -> State[Any]:
    if failures := run.failures():
        return Failed(message="; ".join(f"{outcome.node}: {outcome.message}" for outcome in failures))
    if run.stopping.is_set():
        return Cancelled(message="interrupted")
    made = sum(outcome.result == "made" for outcome in run.outcomes.values())
    reused = len(run.outcomes) - made
    return Completed(message=f"{made} datasets made, {reused} reused" if made else f"nothing new: all {reused} nodes reused")


def run_flow(run: Run, nodes: Choice, overrides: list[str]) -> State[Any]:
    """Run the flow in this process and return its final state; outcomes are in `run`."""
    if run.servers.alone and run.servers.embedded_prefect:
        end_runs_of_killed_commands()
    if not run.servers.embedded_prefect:
        _watch_for_deaths()
    named = recipe_run.with_options(flow_run_name=run.recipe.name)
    asked, values = nodes.model_dump(by_alias=True, exclude_defaults=True), values_of(run.recipe, run.nodes)
    token = RUN.set(run)
    try:
        # The server may hold the automation that waits for heartbeats as often as this.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: HEARTBEAT_SECONDS}):
            recipe, said = snapshot(run.recipe, run.store), unsigned(overrides)
            state = named(recipe, run.store.root, asked, values, said, run.jobs, return_state=True)
        return cast("State[Any]", state)
    finally:
        RUN.reset(token)
        # What Prefect sends in the background (states of tasks, logs) must arrive before its server is stopped.
        for worker in (EventsWorker, APILogWorker):
            worker.drain_all(timeout=10)


def _watch_for_deaths() -> None:
    """On a server of the user's own no later command knows which runs are of killed commands: let the server find out."""
    from pipelines.servers import automations

    # A key that may not make automations may still run.
    with suppress(HTTPError), get_client(sync_client=True) as client:
        automations.install(client)
