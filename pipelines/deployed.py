"""From the parameters of a deployment's flow run to the run itself, in the process that a worker started for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import State

from infra.external import state_folder
from infra.processes import ServerError
from infra.store import Store
from pipelines.jobs import stop_jobs_of, stop_orphans
from pipelines.parameters import changed, choice
from pipelines.run import Outcome, Run, plan_run
from pipelines.selection import check_inputs, select_nodes
from pipelines.servers import Servers, use_servers
from stages.recipe import Recipe, RecipeError, load_recipe

# The name of the state in which the automation puts a run whose process died; see `pipelines.automations`.
RETRYING = "RetryingAfterCrash"


class Unwatched:
    """Nobody looks at a worker's terminal: whoever follows the run does so through Prefect."""

    def started(self, node: str) -> None: ...

    def progress(self, node: str, fields: dict[str, Any]) -> None: ...

    def said(self, node: str, level: int, text: str) -> None: ...

    def finished(self, outcome: Outcome) -> None: ...


@contextmanager
def open_run(flow_run: FlowRun, parameters: Mapping[str, Any]) -> Iterator[Run]:
    """The run that a flow run's parameters describe, with the servers of this machine or the configured ones.

    Raises:
        RecipeError, StageError, StoreError, ServerError: with one line that names the field or the thing, and the fix.
    """
    with get_client(sync_client=True) as client:
        again = flow_run.run_count > 1
        recipe, nodes, force = _asked(parameters)
        if again:
            _check_crashes(client, flow_run, recipe.deploy.crash_retries)
        elif flow_run.name != (name := parameters.get("node") or recipe.name):
            client.update_flow_run(flow_run.id, name=name)
    store = _store(parameters)
    # What the first attempt has forced is a generation of its own by now; forcing again would lose what it has done.
    planned = plan_run(recipe, store, [] if again else force)
    check_inputs(planned, nodes)
    with use_servers(state_folder(store)) as servers:
        run = Run(recipe, store, planned, nodes, servers, Unwatched(), parameters.get("jobs") or 1)
        if run.needs_ray:
            say = logging.getLogger("prefect.flow_runs").log
            servers.begin_ray(lambda ray: stop_orphans(ray, planned, servers.since, say))
        yield run


def _asked(parameters: Mapping[str, Any]) -> tuple[Recipe, list[str], Sequence[str]]:
    """The recipe with what was changed in the form, the nodes in their order, and which of them to force."""
    recipe = load_recipe(parameters["recipe"], parameters.get("overrides") or ())
    config, node = parameters.get("config") or {}, parameters.get("node")
    if node is not None:
        return changed(recipe, {node: config}), recipe.select(node), [node] if parameters.get("force") else []
    recipe, wanted = changed(recipe, config), choice(parameters.get("nodes"))
    return recipe, select_nodes(recipe, wanted.only, wanted.start, wanted.until), wanted.force


def _store(parameters: Mapping[str, Any]) -> Store:
    return Store(parameters.get("store") or "runs")


def _check_crashes(client: SyncPrefectClient, flow_run: FlowRun, allowed: int) -> None:
    """A recipe that kills its process each time must not be started for ever. A Retry in the UI may always try again."""
    names = [state.name for state in sorted(client.read_flow_run_states(flow_run.id), key=lambda state: state.timestamp)]
    # What happened before each attempt: the states between two that say Running, the first being that this run was scheduled.
    before: list[set[str | None]] = [set()]
    for name in names:
        if name == "Running":
            before.append(set())
        before[-1].add(name)
    *attempts, _ = before
    crashes = sum(RETRYING in states for states in attempts)
    if RETRYING in attempts[-1] and crashes > allowed:
        raise ServerError(f"the process of this run died {crashes} times; look at its last log lines, then use Retry")


def stop_left_jobs(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Hook for a cancelled run: stop what its process, killed on the way, left running on Ray."""
    try:
        recipe, nodes, _ = _asked(flow_run.parameters)
        store = _store(flow_run.parameters)
        planned = plan_run(recipe, store)
    except RecipeError:
        return
    ray = Servers(state_folder(store)).find_ray()
    if ray is not None:
        for job in stop_jobs_of(ray, {name: planned[name] for name in nodes}):
            logging.getLogger("prefect.flow_runs").warning("stopped the job %s", job)
