"""What the Prefect server does by itself about our runs: one whose process died, or never began, is started again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events import DeploymentEventTrigger

from infra.prefect_server import HEARTBEAT_SECONDS
from pipelines.flows.deployed import RETRYING
from pipelines.flows.events import COMMITTED, labels
from pipelines.servers.notifications import notifications
from stages.runner.recipe import Recipe

FLOWS = ("recipe", "node")
# Runs with this tag are started again after a crash.
RETRY_TAG = "retry-after-crash"

_HEARTBEAT = "prefect.flow-run.heartbeat"
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed")
# What becomes of a run that a worker has taken, if the worker and the run's process live; and what else may be done with it.
_TAKEN_UP = ("Running", "AwaitingConcurrencySlot", "Scheduled", "AwaitingRetry", RETRYING, "Cancelling")
_ANY_RUN = {"prefect.resource.id": "prefect.flow-run.*"}

# A process that is killed together with its worker says nothing, nor that it lives where it had only just begun. Three heartbeats
# that do not come are no busy machine any more.
DEAD_RUNS = AutomationCore(
    name="unidiffuser: mark runs whose process died",
    description="A run of ours that no longer says that it is alive, and has not ended either, is Crashed.",
    trigger=EventTrigger(
        posture=Posture.Proactive,
        after={"prefect.flow-run.Running", _HEARTBEAT},
        expect={_HEARTBEAT, *(f"prefect.flow-run.{end}" for end in _ENDS)},
        match=_ANY_RUN,
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)},
        for_each={"prefect.resource.id"},
        within=timedelta(seconds=3 * HEARTBEAT_SECONDS),
    ),
    actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message="its process died: no heartbeat came any more")],
)
# A worker reports a crash twice, the second time after a second: to start the run at the first report would have the second one
# end the new attempt. So it is started when nothing more has happened to it for a while.
RETRY = AutomationCore(
    name="unidiffuser: start crashed runs again",
    description="The new attempt attaches to the job that still runs, and reuses what is done. The recipe says how often.",
    trigger=EventTrigger(
        posture=Posture.Proactive,
        after={"prefect.flow-run.Crashed"},
        expect={f"prefect.flow-run.{state}" for state in ("Pending", "Running", "AwaitingRetry", RETRYING, *_ENDS[:-1])},
        match=_ANY_RUN,
        match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{RETRY_TAG}"},
        for_each={"prefect.resource.id"},
        within=timedelta(seconds=10),
    ),
    actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name=RETRYING, message="started again after its process died")],
)
# A worker that is killed after it has taken a run, and before the run's process says anything, leaves it Pending.
UNBEGUN = AutomationCore(
    name="unidiffuser: give runs that never began to a worker again",
    description="A run that a worker has taken, and of which nothing was heard since, waits for a worker again.",
    trigger=EventTrigger(
        posture=Posture.Proactive,
        after={"prefect.flow-run.Submitting", "prefect.flow-run.Pending"},
        expect={f"prefect.flow-run.{state}" for state in (*_TAKEN_UP, *_ENDS)},
        match=_ANY_RUN,
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)},
        for_each={"prefect.resource.id"},
        within=timedelta(seconds=3 * HEARTBEAT_SECONDS),
    ),
    actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name="Scheduled", message="the worker that had taken it is gone")],
)


def install(client: SyncPrefectClient) -> None:
    """Make or renew the automations that all recipes share. One that is renewed forgets what it has seen, such as the last
    heartbeat of a run that died a minute ago: so it is only when it has become another one."""
    for automation in (DEAD_RUNS, RETRY, UNBEGUN):
        found = client.read_automations_by_name(automation.name)
        if not found:
            client.create_automation(automation)
        elif _content(found[0]) != _content(automation):
            # One that somebody has switched off stays so: what is not set here is not sent.
            client.update_automation(UUID(str(found[0].id)), automation)


def _content(automation: AutomationCore) -> dict[str, Any]:
    return automation.model_dump(include={"description", "trigger", "actions"})


def install_triggers(client: SyncPrefectClient, recipe: Recipe, deployment: UUID, blocks: Sequence[UUID]) -> None:
    """Start the recipe's deployment when a node that it names under `deploy.after` has committed a new dataset, and tell the
    blocks of its runs that end badly.

    What somebody has switched off of these stays so.
    """
    resource = f"prefect.deployment.{deployment}"
    off = {one.name for one in client.read_resource_related_automations(resource) if not one.enabled}
    client.delete_resource_owned_automations(resource)
    for automation in [*_triggers(recipe, deployment), *notifications(recipe, blocks)]:
        changes = {"enabled": automation.name not in off, "owner_resource": resource}
        client.create_automation(automation.model_copy(update=changes))


def _triggers(recipe: Recipe, deployment: UUID) -> Iterator[AutomationCore]:
    for other in recipe.deploy.after:
        trigger = DeploymentEventTrigger(
            name=f"{recipe.name} after {other.recipe} {other.node}",
            expect={COMMITTED},
            match=labels(other.recipe, other.node),
        )
        trigger.set_deployment_id(deployment)
        yield trigger.as_automation()


def trigger_names(client: SyncPrefectClient, deployment: DeploymentResponse) -> list[str]:
    """The automations that `install_triggers` has made for a deployment; somebody may have made others that start it."""
    found = client.read_resource_related_automations(f"prefect.deployment.{deployment.id}")
    return [automation.name for automation in found if automation.name.startswith(f"{deployment.name} after ")]
