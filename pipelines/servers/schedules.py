"""A recipe's schedules as Prefect has them: when they come next, and what of them stays when the recipe is deployed again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.server.schemas import schedules as server
from pydantic import ValidationError

from pipelines.flows.parameters import Choice
from pipelines.flows.selection import select_nodes
from stages.runner.deployment import Schedule
from stages.runner.recipe import Recipe, RecipeError, explain

SLUG = "schedule-"
# A rule whose dates take longer to find would hold up the server as well, which looks for them again and again; in seconds.
PATIENCE = 20.0
# Why a schedule that is well written may never come, by its kind.
_NEVER = {
    "cron": "no month of those has such a day",
    "interval": "it is too long",
    "rrule": (
        "UNTIL is read on the schedule's own clock and has no Z, COUNT counts from DTSTART (2020 where none is given), and for "
        "minutes or seconds there is `interval`"
    ),
}


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
    made = DeploymentScheduleCreate(
        schedule=when, active=schedule.active, slug=f"{SLUG}{number}", parameters={"nodes": chosen} if chosen else {}
    )
    if not next_dates(made):
        kind = next(kind for kind in _NEVER if getattr(schedule, kind) is not None)
        words = " ".join(str(getattr(schedule, kind)).split())
        raise RecipeError(f"{place}.{kind}: {words} has no next date that could be found; {_NEVER[kind]}")
    return made


def next_dates(schedule: DeploymentScheduleCreate, count: int = 3) -> list[datetime]:
    """The next dates of a schedule, on its own clock, as Prefect's server finds them; none where it finds none in time."""
    kinds: dict[type, Any] = {
        CronSchedule: server.CronSchedule,
        IntervalSchedule: server.IntervalSchedule,
        RRuleSchedule: server.RRuleSchedule,
    }
    found: list[datetime] = []

    def find() -> None:
        when = kinds[type(schedule.schedule)].model_validate(schedule.schedule.model_dump())
        try:
            found.extend(asyncio.run(when.get_dates(count)))
        except (ValueError, ArithmeticError, LookupError):
            # What croniter and dateutil raise when they come to the end of the calendar, or of a rule.
            pass

    # As a daemon: one that does not find an end does not keep the command.
    thread = threading.Thread(target=find, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return list(found)


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
