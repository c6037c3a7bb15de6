"""Going back to the last good checkpoint in the middle of a run, and on past the places that brought it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from training.begin import Begin, Growth
from training.damage import Damage
from training.job import Keeper, TrainingError


@dataclass(frozen=True)
class Back:
    """Where a run goes on that goes back.

    Attributes:
        step: of the checkpoint.
        order_from: such that its next step reads the place after those that were reached.
        growth: how many shards there were, by place.
        damage: what was met so far.
        said: in words, why.
        tries: how often in a row a run went back without a step that the optimizer took.
    """

    step: int
    order_from: int
    growth: tuple[Growth, ...]
    damage: Damage
    said: str
    tries: int

    def begin(self, found: Begin) -> Begin:
        """Where the counts of the run stand."""
        return replace(found, order_from=self.order_from, growth=self.growth)


class GoBack(Exception):  # noqa: N818
    """Raised out of a run on all workers alike."""

    def __init__(self, back: Back) -> None:
        super().__init__(back.said)
        self.back = back


def go_back(keeper: Keeper, step: int, begin: Begin, damage: Damage, allowed: int, tries: int, why: str, fork: str) -> GoBack:
    """What to raise to go back from a step; all workers must call this.

    A run that comes to harm again before any step was taken goes back to the checkpoint before, since its own is no good one.

    Args:
        allowed: rollbacks in all.
        tries: as of `Back`, those before.
        why: what has happened, in words.
        fork: what a person writes to go on from the newest checkpoint with another value.

    Raises:
        TrainingError: too many, or there is no checkpoint to go back to.
    """
    found: list[Sequence[int]] = [keeper.steps() if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(found, src=0)
    there = [kept for kept in found[0] if kept <= step]
    if tries:
        there = [kept for kept in there if kept < begin.step] or there
    seen = f"{why} ({'; '.join(damage.seen)})" if damage.seen else why
    if not there:
        raise TrainingError(
            f"step {step}: {seen}, and there is no checkpoint to go back to: lower optimizer.lr or set gradient_clip, or check "
            "the latents of these steps"
        )
    if damage.rollbacks >= allowed:
        raise TrainingError(
            f"step {step}: {seen}, and damage.rollbacks allows {allowed}: lower optimizer.lr or set gradient_clip, and go on "
            f"from the last checkpoint with {fork}, or check the latents of these steps"
        )
    target = there[-1]
    for later in found[0] if dist.get_rank() == 0 else ():
        if target < later <= step:
            keeper.set_aside(later)
    met = damage.model_copy(update={"rollbacks": damage.rollbacks + 1, "in_a_row": 0})
    said = f"{why}: went back from step {step} to the checkpoint of step {target}, and on past the places between"
    return GoBack(Back(target, begin.order_from - (step - target), begin.growth, met, said, tries + 1))
