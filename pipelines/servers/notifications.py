"""Who is told of a recipe's runs that end badly: Prefect's own notification blocks, by automations on the server."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.blocks import notifications as prefect_blocks
from prefect.blocks.abstract import NotificationBlock
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import SendNotification
from prefect.exceptions import ObjectNotFound

from stages.runner.recipe import Recipe, RecipeError

# A crashed run that is to be started again has been within this time, and the server may be busy.
FOR_GOOD = timedelta(seconds=45)
_GOES_ON = ("Pending", "Running", "AwaitingRetry", "RetryingAfterCrash", "Scheduled", "Late", "Completed", "Failed", "Cancelled")
# What Prefect's own blocks derive from.
_BASES = {"abstractapprisenotificationblock", "apprisenotificationblock", "notificationblock"}
_SUBJECT = "{{ deployment.name }}: {{ flow_run.state.name }}"
_BODY = "The run {{ flow_run.name }} of {{ deployment.name }} ended: {{ flow_run.state.name }}.\n{{ flow_run.state.message }}\n"


def blocks_of(client: SyncPrefectClient, recipe: Recipe) -> list[UUID]:
    """The server's blocks that the recipe names under `deploy.notify`.

    Raises:
        RecipeError: there is no such block, or it is none that notifies.
    """
    found = []
    for number, name in enumerate(recipe.deploy.notify):
        slug, _, block = name.partition("/")
        place = f"deploy.notify.{number}: {name}"
        try:
            document = client.read_block_document_by_name(block, slug)
        except ObjectNotFound:
            _offer(slug, place)
            raise RecipeError(
                f"{place} is not on the Prefect server; make it there under Blocks, or name another one as TYPE/NAME"
            ) from None
        if document.block_schema is None or "notify" not in document.block_schema.capabilities:
            raise RecipeError(f"{place} notifies nobody; name a notification block, such as slack-webhook/{block}")
        found.append(document.id)
    return found


def _offer(slug: str, place: str) -> None:
    """Make the server know the type of a block, so that one can be made there: ours starts without any.

    Raises:
        RecipeError: there is no such type.
    """
    found = [kind for kind in vars(prefect_blocks).values() if isinstance(kind, type) and issubclass(kind, NotificationBlock)]
    kinds: dict[str, Any] = {kind.get_block_type_slug(): kind for kind in found if kind.__module__ == prefect_blocks.__name__}
    if slug not in kinds:
        raise RecipeError(f"{place}: there is no such type; expected {', '.join(sorted(set(kinds) - _BASES))}")
    kinds[slug].register_type_and_schema(_sync=True)


def notifications(recipe: Recipe, blocks: Sequence[UUID]) -> list[AutomationCore]:
    """What tells the blocks of runs of the recipe and of its nodes that failed, or crashed and were not started again."""
    if not blocks:
        return []
    runs = {
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.recipe:{recipe.name}"},
        "for_each": {"prefect.resource.id"},
    }
    failed = EventTrigger(expect={"prefect.flow-run.Failed"}, posture=Posture.Reactive, threshold=1, **runs)
    crashed = EventTrigger(
        after={"prefect.flow-run.Crashed"},
        expect={f"prefect.flow-run.{state}" for state in _GOES_ON},
        posture=Posture.Proactive,
        within=FOR_GOOD,
        **runs,
    )
    told = [SendNotification(block_document_id=block, subject=_SUBJECT, body=_BODY) for block in blocks]
    return [
        AutomationCore(name=f"{recipe.name}: tell of runs that {how}", trigger=trigger, actions=told)
        for how, trigger in (("failed", failed), ("crashed", crashed))
    ]
