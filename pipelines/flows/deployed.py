"""From the parameters of a deployment's flow run to the run itself, in the process that a worker started for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from httpx import HTTPError
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import State

from infra.external import state_folder
from infra.processes import ServerError
from infra.store import Store
from pipelines.flows.jobs import stop_jobs_of, tidy
from pipelines.flows.names import is_made_up, name_of_changes
from pipelines.flows.parameters import changed, choice
from pipelines.flows.run import Outcome, Run, plan_run, snapshot
from pipelines.flows.selection import check_inputs, select_nodes
from pipelines.servers.servers import Servers, use_servers
from stages.runner.recipe import Recipe, RecipeError, load_recipe

# The name of the state in which the automation puts a run whose process died; see `pipelines.servers.automations`.
RETRYING = "RetryingAfterCrash"
# Within this time the server has put a crashed run in that state, if it ever does.
RETRY_WITHIN = timedelta(minutes=2)
# Label of a flow run whose first attempt has forced what it was to force: that is a generation of its own by now, and forcing
# again would lose what has been done of it.
FORCED = "forced"
# And of one that was asked for with --debug.
DEBUGGED = "debug"


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
        store = _store(parameters)
        recipe, nodes, force = _asked(parameters, store)
        if flow_run.run_count > 1:
            _check_crashes(client, flow_run, recipe.deploy.crash_retries)
        elif is_made_up(flow_run.name):
            client.update_flow_run(flow_run.id, name=_name(client, flow_run, recipe, nodes))
        planned = plan_run(recipe, store, [] if flow_run.labels.get(FORCED) else force)
        if force:
            client.update_flow_run_labels(flow_run.id, {FORCED: True})
    check_inputs(planned, nodes)
    with use_servers(state_folder(store)) as servers:
        run = Run(recipe, store, planned, nodes, servers, Unwatched(), parameters.get("jobs") or 1)
        run.debug = bool(flow_run.labels.get(DEBUGGED))
        if run.needs_ray:
            say = logging.getLogger("prefect.flow_runs").log
            goes_on = partial(_goes_on, flow_run.id)
            servers.begin_ray(lambda ray: tidy(ray, run, say, goes_on))
        yield run


def _goes_on(mine: UUID, owner: str) -> bool:
    """Whether another flow run than mine will be back at its job, though its process is dead: it has not ended for good."""
    if owner == str(mine):
        return False
    with get_client(sync_client=True) as client:
        try:
            flow_run = client.read_flow_run(UUID(owner))
        except ObjectNotFound:
            return False
        except HTTPError:
            # A server that is starting again does not say.
            return True
    state = flow_run.state
    # Without a deployment it was a command's, and that command is no more.
    if state is None or flow_run.deployment_id is None:
        return False
    return not state.is_final() or (state.is_crashed() and datetime.now(UTC) - state.timestamp < RETRY_WITHIN)


def _name(client: SyncPrefectClient, flow_run: FlowRun, recipe: Recipe, nodes: Sequence[str]) -> str:
    """What was changed of the deployment's recipe; else the node, or the recipe."""
    given = client.read_deployment(flow_run.deployment_id).parameters if flow_run.deployment_id else {}
    return (plain := deployed_recipe(given)) and name_of_changes(plain, recipe, nodes) or given.get("node") or recipe.name


def deployed_recipe(parameters: Mapping[str, Any]) -> Recipe | None:
    """The recipe that a deployment's parameters name; None where that cannot be read any more."""
    try:
        return load_recipe(parameters["recipe"])
    except (RecipeError, KeyError, OSError):
        return None


def _asked(parameters: Mapping[str, Any], store: Store) -> tuple[Recipe, list[str], Sequence[str]]:
    """The recipe with what was changed in the form, the nodes in their order, and which of them to force."""
    config, node = parameters.get("config") or {}, parameters.get("node")
    recipe = _changed(parameters, config if node is None else {node: config}, store)
    if node is not None:
        nodes = select_nodes(recipe, start=node) if parameters.get("follow") else [node]
        return recipe, nodes, [node] if parameters.get("force") else []
    wanted = choice(parameters.get("nodes"))
    return recipe, select_nodes(recipe, wanted.only, wanted.start, wanted.until), wanted.force


def _changed(parameters: Mapping[str, Any], config: Mapping[str, Any], store: Store) -> Recipe:
    """The recipe with the form's fields of nodes, and then its overrides.

    A run from the terminal holds every field, and its recipe its overrides already: in a copy of such a run either can be edited,
    and the other one, as it was, does not undo that.
    """
    plain = load_recipe(parameters["recipe"])
    recipe, overrides = changed(plain, config), parameters.get("overrides") or []
    if overrides and load_recipe(parameters["recipe"], overrides).document != plain.document:
        return load_recipe(snapshot(recipe, store), overrides)
    return recipe


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
    ray = Servers(state_folder(_store(flow_run.parameters))).find_ray()
    if ray is not None:
        for job in stop_jobs_of(ray, str(flow_run.id)):
            logging.getLogger("prefect.flow_runs").warning("stopped the job %s", job)
