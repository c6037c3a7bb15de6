"""When a node's task begins: its inputs are made, it has its turn in its run, and its GPU slots.

The bar of a task in the graph of a run is work, so all waiting is done before there is a task.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

from prefect import get_run_logger
from prefect.futures import PrefectFuture

from infra.dataset import find
from pipelines.flows.jobs import NodeStopped, own_turn
from pipelines.flows.run import Outcome, Run
from pipelines.flows.slots import gpu_slots
from stages.runner.graph import Planned

Submit = Callable[[str, dict[str, PrefectFuture[Any]]], PrefectFuture[Any]]
# What a thread ends with: the task that it submitted and that has ended, or None for a node that never had its turn.
Ended = PrefectFuture[Any] | None
# Prefect counts the runs of a task as they are submitted.
_SUBMITTING = threading.Lock()


def tasks_in_turn(run: Run, submit: Submit) -> dict[str, Ended]:
    """Submit every node's task when it can work, and wait for all of them.

    Args:
        submit: takes a node and its inputs' tasks, by the inputs' names.
    """
    tasks: dict[str, Future[Ended]] = {}
    with ThreadPoolExecutor(len(run.nodes)) as threads:
        for node in run.nodes:
            before = {name: tasks[n] for name, n in run.planned[node].input_nodes.items() if n in tasks}
            tasks[node] = threads.submit(copy_context().run, _in_turn, run, node, before, submit)
    return {node: future.result() for node, future in tasks.items()}


def _in_turn(run: Run, node: str, before: Mapping[str, Future[Ended]], submit: Submit) -> Ended:
    inputs = {name: future for name, of in before.items() if (future := of.result()) is not None}
    if len(inputs) < len(before):
        return None
    planned = run.planned[node]
    # A task whose input failed never begins, and one that finds its dataset is done at once.
    works = all(future.state.is_completed() for future in inputs.values()) and not _is_there(run, planned)
    try:
        with _turn(run, planned) if works else nullcontext():
            with _SUBMITTING:
                submitted = submit(node, inputs)
            submitted.wait()
            return submitted
    except NodeStopped:
        run.finish(Outcome(node, "stopped"))
    except Exception as error:
        run.finish(Outcome(node, "failed", message=f"it could not begin: {type(error).__name__}: {error}"))
    return None


def _is_there(run: Run, planned: Planned) -> bool:
    return find(run.store, planned.stage, planned.fingerprint) is not None


@contextmanager
def _turn(run: Run, planned: Planned) -> Iterator[None]:
    """The node's turn in its run, and its GPU slots. Slots are others' too: none is held by a node that waits for its turn.

    Raises:
        NodeStopped: the run was stopped while the node waited.
    """
    logger: Any = get_run_logger()
    with own_turn(run), gpu_slots(planned, run.stopping, partial(logger.info, "%s waits for %d GPU slots", planned.name)):
        yield
