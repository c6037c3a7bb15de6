"""The `deploy` section of a recipe: when and where it runs by itself. None of it can change a result."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from zoneinfo import available_timezones

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from infra.secret_words import secrets_in

# Bounds of cron's five fields, and the names that stand for numbers in two of them.
_CRON = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 7)}
_CRON_NAMES = {
    "month": ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    "weekday": ("sun", "mon", "tue", "wed", "thu", "fri", "sat"),
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Schedule(_Section):
    """A moment that comes again: exactly one of `cron`, `interval` and `rrule`; and what runs then, by default all nodes."""

    cron: str | None = Field(None, description="five fields, such as `0 2 * * *` for every night at two")
    interval: float | None = Field(None, gt=0, description="seconds from one start to the next")
    rrule: str | None = Field(None, description="RFC 5545, such as `FREQ=WEEKLY;BYDAY=SA;BYHOUR=6`")
    timezone: str = Field("UTC", description="the clock that cron and rrule go by, such as Europe/Berlin")
    active: bool = Field(True, description="as it is registered; afterwards the switch in the UI decides, until this changes")
    only: tuple[str, ...] = Field((), description="only these nodes")
    start: str | None = Field(None, alias="from", description="this node and what follows from it")
    until: str | None = Field(None, description="this node and what it needs")

    @field_validator("timezone")
    @classmethod
    def _known(cls, timezone: str) -> str:
        if timezone not in available_timezones():
            raise ValueError("no such time zone; expected a name such as Europe/Berlin")
        return timezone

    @field_validator("cron")
    @classmethod
    def _five_fields(cls, cron: str | None) -> str | None:
        # Prefect has a check of its own, but must not be imported before its server is chosen; `deploy` asks that one too.
        fields = (cron or "").lower().split()
        if cron is not None and len(fields) != len(_CRON):
            raise ValueError("expected five fields: minute, hour, day, month and weekday")
        for (name, bounds), field in zip(_CRON.items(), fields, strict=False):
            if not all(_is_cron(part, bounds, _CRON_NAMES.get(name, ())) for part in field.split(",")):
                raise ValueError(f"{field} is no {name}; expected *, or {bounds[0]} to {bounds[1]}, such as 2, 1-5, */10 or 1,15")
        return cron

    @field_validator("rrule")
    @classmethod
    def _rule(cls, rrule: str | None) -> str | None:
        if rrule is not None:
            from dateutil.rrule import rrulestr

            try:
                rrulestr(rrule)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"no rule of RFC 5545 ({error}); expected one such as FREQ=WEEKLY;BYDAY=SA;BYHOUR=6") from None
            # Prefect counts from a start without a Z, and such a rule raises each time its server looks for dates.
            if "DTSTART" not in rrule.upper() and re.search(r"UNTIL=\w+Z\b", rrule.upper()):
                raise ValueError("UNTIL ends with Z, and Prefect reads it on the clock of `timezone`: leave out the Z")
        return rrule

    @model_validator(mode="after")
    def _one_kind(self) -> Schedule:
        if sum(kind is not None for kind in (self.cron, self.interval, self.rrule)) != 1:
            raise ValueError("expected exactly one of cron, interval and rrule")
        return self


def _is_cron(part: str, bounds: tuple[int, int], names: tuple[str, ...]) -> bool:
    """Whether a part of a cron field is ``*``, a number or a range within the bounds, with or without a step; or one of Prefect's
    extras: ``L`` for the last day, ``L5`` for the last Friday, ``5#2`` for the second."""
    found = re.fullmatch(r"(?:[*?l]|l?(\w+)(?:-(\w+)|#[1-5])?)(?:/[1-9]\d*)?", part)
    if found is None:
        return False
    ends = [str(bounds[0] + names.index(end)) if end in names else end for end in found.groups() if end is not None]
    return all(end.isdecimal() and bounds[0] <= int(end) <= bounds[1] for end in ends)


class Trigger(_Section):
    """A new dataset of another recipe (or of this one) that starts this recipe."""

    recipe: str = Field(description="name of the recipe whose dataset is waited for")
    node: str = Field(description="its node")


class Pool(_Section):
    """The Prefect work pool whose workers run the flow. The work itself is done by Ray, wherever the flow runs."""

    name: str = Field("local", description="its name on the server; `up` starts a worker of `local`")
    type: Literal["process", "docker", "kubernetes"] = Field("process", description="what a run becomes")
    variables: dict[str, Any] = Field({}, description="job variables of the pool: `image`, `env`, `volumes`, `namespace`, ...")

    @field_validator("variables")
    @classmethod
    def _open_to_all(cls, variables: dict[str, Any]) -> dict[str, Any]:
        if found := list(secrets_in(variables)):
            raise ValueError(
                f"{found[0]} looks like a secret, which the store and Prefect's server would show; name a block of that server "
                "instead, as {{ prefect.blocks.secret.NAME }}, or set it in the environment of the pool's worker"
            )
        return variables


class Deploy(_Section):
    """How `unidiffuser deploy` registers a recipe on a Prefect server."""

    pool: Pool = Field(default_factory=Pool)
    schedules: tuple[Schedule, ...] = Field((), description="when it runs by itself")
    after: tuple[Trigger, ...] = Field((), description="new datasets that start the recipe")
    notify: tuple[Annotated[str, Field(pattern=r"^[a-z0-9-]+/.+$")], ...] = Field(
        (), description="notification blocks of the server, as TYPE/NAME, that are told of runs that failed or crashed"
    )
    tags: tuple[str, ...] = Field((), description="tags of the deployment and of its runs")
    jobs: int = Field(1, ge=1, description="how many nodes work at a time")
    gpus: int | None = Field(None, ge=1, description="GPU slots that all recipes of the server share; nodes wait for theirs")
    crash_retries: int = Field(2, ge=0, description="how often a run whose process died is started again by itself")
