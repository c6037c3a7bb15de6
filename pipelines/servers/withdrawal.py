"""`unidiffuser undeploy`: a recipe's deployments go from the Prefect server, with what was made for them; its data stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    DeploymentFilterTags,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

from infra.nearest import nearest
from infra.processes import ServerError
from infra.store import NotThere, Store
from pipelines.flows.slots import LIMIT
from pipelines.servers.automations import trigger_names
from pipelines.servers.deployments import deployed_as, recipe_tag
from pipelines.servers.owners import Owner, refusal, whoami
from stages.runner.recipe import Recipe, RecipeError

_GOING_ON = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]


@dataclass
class Withdrawn:
    """Names of the deployments and triggers that `undeploy` has removed, and whether the limit of GPU slots went with them."""

    deployments: list[str] = field(default_factory=list)
    triggers: list[str] = field(default_factory=list)
    gpus: bool = False


def undeploy(recipe: Recipe | str, store: Store, others: bool = False) -> Withdrawn:
    """Remove a recipe's deployments, their triggers, and the limit of GPU slots if no other recipe wants one.

    Args:
        recipe: the recipe, or the name that it is deployed under.
        others: also if somebody else has deployed it.

    Raises:
        NotThere: nothing is deployed under this name.
        RecipeError: it is somebody else's.
        ServerError: a run of it is going on.
    """
    name = recipe if isinstance(recipe, str) else recipe.name
    done = Withdrawn()
    with get_client(sync_client=True) as client:
        ours = deployments_of(client, name)
        if not ours:
            raise NotThere(_not_there(client, name))
        foreign = [found for found in ours if not _is_mine(found, recipe, store)]
        triggers = [trigger for found in ours for trigger in trigger_names(client, found)]
        if foreign and not others:
            raise RecipeError(refusal(name, foreign, triggers, "its own file and store remove it, or --others"))
        _check_idle(client, name, [found.id for found in ours])
        # Read while the deployments still tell of their recipes.
        done.gpus = _needs_no_limit(client, ours)
        for found in ours:
            client.delete_resource_owned_automations(f"prefect.deployment.{found.id}")
            client.delete_deployment(found.id)
            done.deployments.append(found.name)
        done.triggers = triggers
        if done.gpus:
            client.delete_global_concurrency_limit_by_name(LIMIT)
    return done


def deployments_of(client: SyncPrefectClient, recipe: str) -> list[DeploymentResponse]:
    """The deployment of the whole recipe first, then those of its nodes; a copy that somebody has made stays somebody's."""
    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[recipe_tag(recipe)]))
    found = client.read_deployments(deployment_filter=tagged)
    ours = [each for each in found if each.name in (recipe, f"{recipe}-{each.parameters.get('node')}")]
    return sorted(ours, key=lambda each: (each.name != recipe, each.name))


def _is_mine(found: DeploymentResponse, recipe: Recipe | str, store: Store) -> bool:
    owner = Owner.read(found)
    if owner is None:
        return False
    # A name alone says nothing of the file: whoever deployed it may take it away by its name.
    return owner == Owner.of(recipe, store) if isinstance(recipe, Recipe) else (owner.store, owner.by) == (store.root, whoami())


def _not_there(client: SyncPrefectClient, name: str) -> str:
    names = [each.name for each in _whole(client)]
    return f"{name}: no recipe file, and no recipe is deployed under this name{nearest(name, names) or '; none is deployed'}"


def _whole(client: SyncPrefectClient) -> list[DeploymentResponse]:
    return client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=["recipe"])))


def _check_idle(client: SyncPrefectClient, name: str, deployments: list[UUID]) -> None:
    """A run without its deployment could not be retried, and its job would be taken for one that nobody comes back to."""
    of = DeploymentFilter(id=DeploymentFilterId(any_=deployments))
    for state in (
        FlowRunFilterState(type=FlowRunFilterStateType(any_=_GOING_ON)),
        FlowRunFilterState(name=FlowRunFilterStateName(any_=["AwaitingConcurrencySlot"])),
    ):
        for run in client.read_flow_runs(deployment_filter=of, flow_run_filter=FlowRunFilter(state=state), limit=1):
            raise ServerError(f"{name}: its run {run.name} ({run.id}) has not ended; cancel it in the UI, or wait for its end")


def _needs_no_limit(client: SyncPrefectClient, going: Sequence[DeploymentResponse]) -> bool:
    """Whether the limit of GPU slots was made for this recipe, is as it made it, and is no other's."""
    try:
        limit = client.read_global_concurrency_limit_by_name(LIMIT)
    except ObjectNotFound:
        return False
    before = deployed_as(going[0])
    if before is None or before.deploy.gpus != limit.limit or limit.active_slots:
        return False
    others = [deployed_as(each) for each in _whole(client) if each.id != going[0].id]
    return all(other is not None and other.deploy.gpus is None for other in others)
