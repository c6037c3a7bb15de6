"""The ways in which a run ends before its time: signals, a cancel in the UI, a process that died."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

from pipelines.flows.run import Run

# How often the UI is asked whether somebody cancelled the run, in seconds.
CANCEL_POLL = 3.0


@contextmanager
def stop_on_signals(run: Run) -> Iterator[None]:
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
def stop_on_cancel(run: Run, flow_run: UUID) -> Iterator[None]:
    """Ask the server whether the run was cancelled: nobody but the flow itself can stop a run that has no deployment."""
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
    """A command that was killed could not say so: its runs would stay Running for ever. Deployments' have their automation."""
    running = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])),
        deployment_id=FlowRunFilterDeploymentId(is_null_=True),
    )
    with get_client(sync_client=True) as client:
        for flow_run in client.read_flow_runs(flow_run_filter=running):
            client.set_flow_run_state(flow_run.id, Crashed(message="its command was killed"), force=True)
