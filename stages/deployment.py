"""The `deploy` section of a recipe: when and where it runs by itself. None of it can change a result."""

from __future__ import annotations

from typing import Any, Literal
from zoneinfo import available_timezones

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Schedule(_Section):
    """A moment that comes again: exactly one of `cron`, `interval` and `rrule`; and what runs then, by default all nodes."""

    cron: str | None = Field(None, description="five fields, such as `0 2 * * *` for every night at two")
    interval: float | None = Field(None, gt=0, description="seconds from one start to the next")
    rrule: str | None = Field(None, description="RFC 5545, such as `FREQ=WEEKLY;BYDAY=SA;BYHOUR=6`")
    timezone: str = Field("UTC", description="the clock that cron and rrule go by, such as Europe/Berlin")
    active: bool = Field(True, description="false: registered, but asleep until it is switched on in the UI")
    only: tuple[str, ...] = Field((), description="only these nodes")
    start: str | None = Field(None, alias="from", description="this node and what follows from it")
    until: str | None = Field(None, description="this node and what it needs")

    @field_validator("timezone")
    @classmethod
    def _known(cls, timezone: str) -> str:
        if timezone not in available_timezones():
            raise ValueError("no such time zone; expected a name such as Europe/Berlin")
        return timezone

    @model_validator(mode="after")
    def _one_kind(self) -> Schedule:
        if sum(kind is not None for kind in (self.cron, self.interval, self.rrule)) != 1:
            raise ValueError("expected exactly one of cron, interval and rrule")
        return self


class Trigger(_Section):
    """A new dataset of another recipe (or of this one) that starts this recipe."""

    recipe: str
    node: str


class Pool(_Section):
    """The Prefect work pool whose workers run the flow. The work itself is done by Ray, wherever the flow runs."""

    name: str = "local"
    type: Literal["process", "docker", "kubernetes"] = "process"
    variables: dict[str, Any] = Field({}, description="job variables of the pool: `image`, `env`, `volumes`, `namespace`, ...")


class Deploy(_Section):
    """How `unidiffuser deploy` registers a recipe on a Prefect server."""

    pool: Pool = Field(default_factory=Pool)
    schedules: tuple[Schedule, ...] = ()
    after: tuple[Trigger, ...] = Field((), description="new datasets that start the recipe")
    tags: tuple[str, ...] = ()
    jobs: int = Field(1, ge=1, description="how many nodes work at a time")
    gpus: int | None = Field(None, ge=1, description="GPU slots that all recipes of the server share; nodes wait for theirs")
    crash_retries: int = Field(2, ge=0, description="how often a run whose process died is started again by itself")
