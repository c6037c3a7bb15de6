"""A recipe's schedules as Prefect has them: when they come next, and what of them stays when the recipe is deployed again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from pydantic import ValidationError

from pipelines.parameters import Choice
from pipelines.selection import select_nodes
from stages.deployment import Schedule
from stages.recipe import Recipe, RecipeError, explain

SLUG = "schedule-"


def prefect_schedules(recipe: Recipe) -> list[DeploymentScheduleCreate]:
    """The recipe's schedules, named by their number.

    Raises:
        RecipeError: one names no node, is none for Prefect, or never comes.
    """
    return [_schedule(recipe, number, schedule) for number, schedule in enumerate(recipe.deploy.schedules)]


def _schedule(recipe: Recipe, number: int, schedule: Schedule) -> DeploymentScheduleCreate:
    place = f"deploy.schedules.{number}"
    select_nodes(recipe, schedule.only, schedule.start, schedule.until)
    try:
        when: Any
        if schedule.cron is not None:
            when = CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
        elif schedule.interval is not None:
            when = IntervalSchedule(interval=timedelta(seconds=schedule.interval), timezone=schedule.timezone)
        else:
            when = RRuleSchedule(rrule=schedule.rrule, timezone=schedule.timezone)
    except (ValidationError, ValueError, OverflowError) as error:
        raise RecipeError(explain(error, place) if isinstance(error, ValidationError) else f"{place}: {error}") from None
    chosen = Choice(only=list(schedule.only), start=schedule.start, until=schedule.until).model_dump(
        by_alias=True, exclude_defaults=True
    )
    return DeploymentScheduleCreate(
        schedule=when, active=schedule.active, slug=f"{SLUG}{number}", parameters={"nodes": chosen} if chosen else {}
    )


def renewed(
    wanted: Sequence[DeploymentScheduleCreate], found: Sequence[DeploymentSchedule], before: Sequence[Schedule]
) -> list[DeploymentScheduleCreate]:
    """The schedules of a deployment that is there already: the recipe's, and those that somebody has added to it.

    One that goes on as it was keeps the moment that its interval counts from. Whether it is awake is for the server to say,
    unless the recipe says now what it did not say `before`.
    """
    said = {f"{SLUG}{number}": schedule.active for number, schedule in enumerate(before)}
    ours = [schedule for schedule in found if (schedule.slug or "").startswith(SLUG)]
    same: dict[str | None, DeploymentSchedule] = {}
    for alike in (lambda a, b: _what(a) == _what(b), lambda a, b: a.slug == b.slug):
        for one in wanted:
            match = next((other for other in ours if one.slug not in same and alike(one, other)), None)
            if match is not None:
                same[one.slug] = match
                ours.remove(match)
    made = []
    for one in wanted:
        if (other := same.get(one.slug)) is not None:
            changed = said.get(str(other.slug), one.active) != one.active
            when = other.schedule if _what(one) == _what(other) else one.schedule
            one = one.model_copy(update={"schedule": when, "active": one.active if changed else other.active})
        made.append(one)
    added = [schedule for schedule in found if not (schedule.slug or "").startswith(SLUG)]
    fields = {"schedule", "active", "max_scheduled_runs", "parameters", "slug"}
    return made + [DeploymentScheduleCreate(**{name: getattr(one, name) for name in fields}) for one in added]


def _what(schedule: DeploymentScheduleCreate | DeploymentSchedule) -> tuple[Any, ...]:
    """What a schedule starts and when, without the moment that an interval is counted from."""
    return schedule.schedule.model_dump(exclude={"anchor_date"}), schedule.parameters
