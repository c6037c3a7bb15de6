"""The Prefect side of a run: a flow with one task a node, chained by futures so that the graph's edges are the data's."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.events.worker import EventsWorker
from prefect.futures import PrefectFuture
from prefect.logging.handlers import APILogWorker
from prefect.states import Cancelled, Completed, Crashed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from infra.dataset import find, point
from pipelines.artifacts import dataset_page, run_page
from pipelines.jobs import NodeFailed, NodeStopped, make_as_job
from pipelines.lineage import artifact_key
from pipelines.run import Outcome, Run

# The run that the flow and its tasks are about. Prefect copies the context into its threads.
RUN: ContextVar[Run] = ContextVar("run")

# How often the UI is asked whether somebody cancelled the run, and how often a progress bar there moves, in seconds.
CANCEL_POLL = 3.0
PROGRESS_EVERY = 2.0


@task
def make_node(node: str, inputs: dict[str, Any]) -> Any:
    """Make or reuse the dataset of one node, and publish its page. `inputs` are the results of the tasks before it."""
    run = RUN.get()
    planned = run.planned[node]
    logger = get_run_logger()
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
            progress = _ProgressArtifact(run, node)
            seconds = make_as_job(run, planned, lambda level, text: _say(run, node, logger, level, text), progress.report)
            dataset = find(run.store, planned.stage, planned.fingerprint)
            if dataset is None:
                raise NodeFailed(f"the job ended well, but {planned.stage}/{planned.fingerprint} is not in {run.store.root}")
        assert dataset is not None
        point(run.store, run.recipe.name, node, dataset.manifest.reference())
        outcome = Outcome(node, "reused" if reused else "made", seconds or time.perf_counter() - start, dataset)
        create_markdown_artifact(
            dataset_page(run, planned, outcome), artifact_key(run.recipe.name, node), f"{planned.stage} {planned.fingerprint}"
        )
    except NodeStopped:
        run.finish(Outcome(node, "stopped", time.perf_counter() - start))
        return Cancelled(message="stopped with the run")
    except NodeFailed as error:
        run.finish(Outcome(node, "failed", time.perf_counter() - start, message=str(error)))
        return Failed(message=str(error))
    run.finish(outcome)
    return Completed(message="reused" if reused else "made", data={"stage": planned.stage, "fingerprint": planned.fingerprint})


def _say(run: Run, node: str, logger: Any, level: int, text: str) -> None:
    logger.log(level, "%s", text)
    run.view.said(node, level, text)


class _ProgressArtifact:
    """The node's progress bar in the UI; made with its first report, moved at most every `PROGRESS_EVERY` seconds."""

    def __init__(self, run: Run, node: str):
        self.run, self.node = run, node
        self.artifact: UUID | None = None
        self.moved = 0.0

    def report(self, fields: dict[str, Any]) -> None:
        self.run.view.progress(self.node, fields)
        finished = fields["done"] >= fields["total"]
        if time.monotonic() - self.moved < PROGRESS_EVERY and not finished:
            return
        self.moved = time.monotonic()
        percent = 100.0 * fields["done"] / max(fields["total"], 1)
        words = f"{self.node} {describe_progress(fields)}"
        if self.artifact is None:
            self.artifact = cast(UUID, create_progress_artifact(percent, description=words))
        else:
            update_progress_artifact(self.artifact, percent, description=words)


def describe_progress(fields: dict[str, Any]) -> str:
    """``write: 3 of 10 units, rows 1200, rows_per_s 340.5``"""
    known = ("node", "phase", "done", "total", "unit")
    more = "".join(f", {name} {value}" for name, value in fields.items() if name not in known)
    return f"{fields['phase']}: {fields['done']} of {fields['total']} {fields['unit']}{more}"


# Every node has a thread; how many work at a time is the run's business (`Run.jobs`).
THREADS: Any = ThreadPoolTaskRunner()


@flow(name="recipe run", flow_run_name="{recipe}", task_runner=THREADS, validate_parameters=False)
def recipe_run(recipe: str, nodes: list[str], store: str, overrides: list[str], force: list[str]) -> Any:
    """Every chosen node of a recipe, as far as its inputs allow; the parameters say in the UI what was asked for."""
    run = RUN.get()
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None
    run.flow_run = str(context.flow_run.id)
    with _stop_on_signals(run), _stop_on_cancel(run, context.flow_run.id):
        futures: dict[str, PrefectFuture[Any]] = {}
        for node in nodes:
            planned = run.planned[node]
            before = {name: futures[n] for name, n in planned.input_nodes.items() if n in futures}
            named = make_node.with_options(name=node, task_run_name=node)
            futures[node] = named.submit(node, before)
        for node, future in futures.items():
            future.wait()
            if node not in run.outcomes:
                run.finish(_without_outcome(node, future.state))
        create_markdown_artifact(run_page(run), artifact_key(run.recipe.name, "lineage"), "datasets of a run")
    return _final_state(run)


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
    return Completed(message=f"{made} datasets made, {len(run.outcomes) - made} reused")


@contextmanager
def _stop_on_signals(run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the jobs and let the flow end in order; a second Ctrl-C breaks off at once."""

    def stop(number: int, _: object) -> None:
        if run.stopping.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stopping.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _stop_on_cancel(run: Run, flow_run: UUID) -> Iterator[None]:
    """Nobody but the flow itself can stop a run that has no deployment: ask the server whether it was cancelled."""
    over = threading.Event()

    def watch() -> None:
        with get_client(sync_client=True) as client:
            while not over.wait(CANCEL_POLL):
                try:
                    state = client.read_flow_run(flow_run).state
                except Exception as error:  # a restarting server must not end the run
                    logging.getLogger("pipelines").debug("the Prefect server does not answer: %s", error)
                    continue
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    run.stopping.set()
                    return

    thread = threading.Thread(target=watch, daemon=True, name="cancellation")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=10)


def end_runs_of_killed_commands() -> None:
    """A command that was killed could not say so: its runs would stay Running for ever."""
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])))
    with get_client(sync_client=True) as client:
        for flow_run in client.read_flow_runs(flow_run_filter=running):
            client.set_flow_run_state(flow_run.id, Crashed(message="its command was killed"), force=True)


def run_flow(run: Run, overrides: list[str], force: list[str]) -> State[Any]:
    """Run the flow in this process and return its final state; outcomes are in `run`."""
    if run.servers.alone and run.servers.embedded_prefect:
        end_runs_of_killed_commands()
    token = RUN.set(run)
    try:
        return cast("State[Any]", recipe_run(run.recipe.name, run.nodes, run.store.root, overrides, force, return_state=True))
    finally:
        RUN.reset(token)
        # What Prefect sends in the background (states of tasks, logs) must arrive before its server is stopped.
        for worker in (EventsWorker, APILogWorker):
            worker.drain_all(timeout=10)
