"""Whose a deployment is: the recipe file and the store that it was deployed from, kept as labels on the Prefect server."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from infra.store import Store
from stages.runner.recipe import Recipe

_RECIPE, _STORE, _BY, _TRIAL = (f"unidiffuser.owner.{part}" for part in ("recipe", "store", "by", "trial"))


@dataclass(frozen=True)
class Owner:
    """The recipe file and the store that a deployment is of, which tell it from others; and who has made it, on which machine."""

    recipe: str
    store: str
    by: str = field(compare=False)

    @classmethod
    def of(cls, recipe: Recipe, store: Store) -> Owner:
        return cls(recipe.file, store.root, whoami())

    @classmethod
    def read(cls, deployment: DeploymentResponse) -> Owner | None:
        """The owner that a deployment tells of; None where it was made by hand or by an older release."""
        labels = deployment.labels or {}
        return cls(str(labels[_RECIPE]), str(labels[_STORE]), str(labels.get(_BY))) if {_RECIPE, _STORE} <= set(labels) else None

    def labels(self, trial: bool = False) -> dict[str, Any]:
        """For the deployment.

        Args:
            trial: `run` has made it, and `deploy` may take it over, whosever it is.
        """
        return {_RECIPE: self.recipe, _STORE: self.store, _BY: self.by, **({_TRIAL: True} if trial else {})}

    def __str__(self) -> str:
        return f"{self.recipe or 'a recipe without a file'} with the store {self.store} (by {self.by})"


def whoami() -> str:
    """``anna on gpu-1``"""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A container's user may have no name.
        user = str(os.getuid())
    return f"{user} on {socket.gethostname()}"


def may_take(deployment: DeploymentResponse, owner: Owner) -> bool:
    """Whether `deploy` may renew a deployment: it is the owner's own, or one that a run needed and to which nobody has added a
    schedule."""
    return Owner.read(deployment) == owner or (is_trial(deployment) and not deployment.schedules)


def is_trial(deployment: DeploymentResponse) -> bool:
    return bool((deployment.labels or {}).get(_TRIAL))


def refusal(name: str, foreign: Sequence[DeploymentResponse], triggers: Sequence[str], fix: str) -> str:
    """One line: whose the deployments of this name are, what would go with them, and what to do."""
    owner = Owner.read(foreign[0]) or "somebody else (nobody wrote down whose)"
    starts = [describe(schedule) for deployment in foreign for schedule in deployment.schedules] + [*triggers]
    loss = f"; these schedules and triggers would go: {', '.join(starts)}" if starts else ""
    return f"{name}: a deployment of this name is of {owner}{loss}; {fix}"


def describe(schedule: DeploymentSchedule) -> str:
    """``cron 0 2 * * * (Europe/Berlin)``"""
    when: Any = schedule.schedule
    if isinstance(when, CronSchedule):
        words = f"cron {when.cron}"
    elif isinstance(when, IntervalSchedule):
        words = f"every {when.interval}"
    else:
        words = f"rrule {when.rrule}"
    return " ".join(f"{words} ({when.timezone or 'UTC'}{'' if schedule.active else ', switched off'})".split())
