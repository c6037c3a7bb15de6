"""What a training does about damage: a step that is not finite is skipped, and several in a row roll back.

A step whose loss or gradient is not finite is skipped before the optimizer, on all workers alike: nothing but its place in the
order is used up. More of them in a row than are allowed roll back to the last good checkpoint, from which the training goes on
past those places; before its first one that is the checkpoint, or the weights, that it began from. More rollbacks than are
allowed stop it.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field

from training.section import OPERATIONAL, Section

# Applied steps over which the norm of a usual gradient is averaged, and before which nothing counts as a spike.
USUAL = 100
# How many of the last skipped steps are told when a training stops.
TOLD = 8


class DamageConfig(Section):
    """What is done about steps, checkpoints and row groups that are damaged."""

    steps_in_a_row: int = Field(
        3,
        ge=0,
        description="Steps in a row that may be skipped because their loss or gradient is not finite; one more rolls back to the "
        "last good checkpoint, and training goes on past their places in the order.",
        json_schema_extra=OPERATIONAL,
    )
    rollbacks: int = Field(3, ge=0, description="Rollbacks of a training; one more stops it.", json_schema_extra=OPERATIONAL)
    spike: float | None = Field(
        None,
        gt=1,
        description="A gradient whose norm is so many times the mean of about the last 100 steps counts as damage too; the "
        "paper's recipe has no such rule.",
    )
    skip_damaged: int = Field(
        0,
        ge=0,
        description="Row groups that may be damaged: rows of the next one take the place of theirs; one more stops the training.",
        json_schema_extra=OPERATIONAL,
    )


class Damage(BaseModel):
    """What a training has met so far; part of a checkpoint, so that a run that goes on decides alike.

    Attributes:
        skipped: steps that were skipped.
        in_a_row: those of them since the last one that was not.
        rollbacks: to an earlier checkpoint.
        usual: mean of the norm of the gradient, and `steps` that are in it.
        seen: the last steps that were skipped, in words.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=False)

    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0
    usual: float = 0.0
    steps: int = 0
    seen: list[str] = []

    def refuses(self, norm: float, config: DamageConfig) -> bool:
        """Whether a gradient of this norm is damage."""
        if not math.isfinite(norm):
            return True
        return config.spike is not None and self.steps >= USUAL and norm > config.spike * self.usual

    def applied(self, norm: float) -> None:
        """Count a step that the optimizer has taken."""
        self.in_a_row = 0
        self.steps += 1
        self.usual += (norm - self.usual) / min(self.steps, USUAL)

    def skip(self, step: int, loss: float, norm: float) -> None:
        """Count a step that was skipped."""
        self.skipped += 1
        self.in_a_row += 1
        self.seen = [*self.seen, f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}"][-TOLD:]

    def told(self) -> dict[str, int]:
        """What a row of the history says of it: nothing where all is well."""
        counts = {"skipped": self.skipped, "rollbacks": self.rollbacks}
        return {name: count for name, count in counts.items() if count}
