"""The learning rate over the steps: a linear warm-up, then constant, falling by a formula, or falling by the validation loss.

`plateau` is the paper's rule: divide by 10 when the validation loss stops falling. What it has seen is part of a checkpoint, and
what it looks at is a part of the configuration that decides the result, so a run that was interrupted decides as a whole one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.section import Section

if TYPE_CHECKING:
    from torch.optim import Optimizer

PLATEAU_DIVISOR = 10
# Fields that only some values of `decay` read.
READ_BY = {
    "decay_start": ("linear",), "decay_steps": ("cosine", "linear"), "final_fraction": ("cosine", "linear"),
    "patience": ("plateau",), "look_every": ("plateau",), "look_samples": ("plateau",),
}  # fmt: skip


class ScheduleConfig(Section):
    """Learning rate over the steps: linear warm-up, then what `decay` says."""

    warmup_steps: int = Field(5000, ge=0, description="Steps over which the learning rate rises linearly from 0.")
    decay: Literal["none", "cosine", "linear", "plateau"] = Field(
        "none",
        description="What follows the warm-up: nothing, half a cosine, a straight fall from decay_start on, or a division by "
        "10 whenever the validation loss has stopped falling, as in the paper.",
    )
    decay_start: int | None = Field(None, ge=0, description="Step at which a linear fall begins.")
    decay_steps: int | None = Field(
        None,
        ge=1,
        description="Step at which a cosine or a linear fall ends. A field of its own: a longer run keeps its past.",
    )
    final_fraction: float = Field(0.0, ge=0, le=1, description="Part of the learning rate left after a cosine or a linear fall.")
    patience: int = Field(10, ge=1, description="Looks of plateau in a row without a lower loss, at which it divides.")
    look_every: int = Field(
        1000, ge=1, description="Steps between two looks of plateau. They decide the result; validation.every does not."
    )
    look_samples: int = Field(1024, ge=1, description="Held-out rows of which plateau takes the loss, at most.")

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        for name, kinds in READ_BY.items():
            if self.decay not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is for decay {' or '.join(kinds)}, and decay is {self.decay}: set that, or leave {name} out"
                )
        if self.decay == "cosine" and (self.decay_steps is None or self.decay_steps <= self.warmup_steps):
            raise ValueError(f"decay cosine needs decay_steps greater than warmup_steps ({self.warmup_steps})")
        if self.decay == "linear":
            if self.decay_start is None or self.decay_start < self.warmup_steps:
                raise ValueError(f"decay linear needs decay_start of at least warmup_steps ({self.warmup_steps})")
            if self.decay_steps is None or self.decay_steps <= self.decay_start:
                raise ValueError(f"decay linear needs decay_steps greater than decay_start ({self.decay_start})")
        return self


class Plateau(BaseModel):
    """What the rule `plateau` has seen: the lowest loss, looks since then without a lower one, and divisions so far."""

    model_config = ConfigDict(extra="forbid")

    best: float | None = None
    waited: int = 0
    drops: int = 0

    def look(self, loss: float, patience: int) -> None:
        """Take in a validation loss.

        >>> seen = Plateau()
        >>> for loss in (1.0, 0.5, 0.6, 0.5):
        ...     seen.look(loss, patience=2)
        >>> seen.best, seen.waited, seen.drops
        (0.5, 0, 1)
        """
        if self.best is None or loss < self.best:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited == patience:
            self.waited, self.drops = 0, self.drops + 1


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, drops: int = 0) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    The warm-up gives peak * (step + 1) / warmup_steps, so that its last step has the full rate.

    Args:
        drops: divisions that `plateau` has made so far.

    >>> learning_rate(0, 1.0, ScheduleConfig(warmup_steps=4))
    0.25
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay == "plateau":
        return peak / PLATEAU_DIVISOR**drops
    if schedule.decay == "none" or schedule.decay_steps is None:
        return peak
    start = schedule.warmup_steps if schedule.decay == "cosine" or schedule.decay_start is None else schedule.decay_start
    progress = min(1.0, max(0.0, (step - start) / (schedule.decay_steps - start)))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.decay == "cosine" else 1 - progress
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * share)


def set_learning_rates(optimizer: Optimizer, step: int, schedule: ScheduleConfig, drops: int = 0) -> None:
    """Give every group of an optimizer, whose peak is its `initial_lr`, the `learning_rate` of a step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, group["initial_lr"], schedule, drops)
