"""Going back to the last good checkpoint in the middle of a run, and on past the places that brought it there.

Before a run has a checkpoint of its own, the one that it began from is the last good one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from training.begin import Begin, Growth
from training.damage import Damage
from training.job import TrainingError, TrainJob


@dataclass(frozen=True)
class Back:
    """Where a run goes on that goes back.

    Attributes:
        step: of the checkpoint; None for what the run began from.
        place: of the order, in steps, that its next step reads: the one after those that were reached.
        growth: how many shards there were, by place.
        damage: what was met so far.
        said: in words, why.
        tries: how often in a row a run went back without a step that the optimizer took.
    """

    step: int | None
    place: int
    growth: tuple[Growth, ...]
    damage: Damage
    said: str
    tries: int

    def begin(self, found: Begin) -> Begin:
        """Where the counts of the run stand."""
        return replace(found, order_from=found.step - self.place, growth=self.growth)


class GoBack(Exception):  # noqa: N818
    """Raised out of a run on all workers alike."""

    def __init__(self, back: Back) -> None:
        super().__init__(back.said)
        self.back = back


def go_back(job: TrainJob, step: int, begin: Begin, damage: Damage, tries: int, why: str) -> GoBack:
    """What to raise to go back from a step; all workers must call this.

    A run that comes to harm again before any step was taken goes back to the checkpoint before, since its own is no good one.

    Args:
        begin: where the run began.
        tries: as of `Back`, those before.
        why: what has happened, in words.

    Raises:
        TrainingError: too many, or there is no checkpoint to go back to.
    """
    keeper, allowed = job.publish, job.config.damage.rollbacks
    begun = job.init_from is not None or job.weights is not None
    found: list[Sequence[int]] = [keeper.steps() if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(found, src=0)
    there = [kept for kept in found[0] if kept <= step]
    if tries:
        there = [kept for kept in there if kept < begin.step] or ([] if begun else there)
    seen = f"{why} ({'; '.join(damage.seen)})" if damage.seen else why
    if not there and not begun:
        raise TrainingError(
            f"step {step}: {seen}, and there is no checkpoint to go back to: lower optimizer.lr or set gradient_clip, or check "
            "the latents of these steps"
        )
    if damage.rollbacks >= allowed:
        raise TrainingError(
            f"step {step}: {seen}, and damage.rollbacks allows {allowed}: lower optimizer.lr or set gradient_clip, and go on "
            f"from the last checkpoint with {job.fork}, or check the latents of these steps"
        )
    target = there[-1] if there else None
    for later in found[0] if dist.get_rank() == 0 else ():
        if later <= step and (target is None or target < later):
            keeper.set_aside(later)
    met = damage.model_copy(update={"rollbacks": damage.rollbacks + 1, "in_a_row": 0})
    where = "what it began from" if target is None else f"the checkpoint of step {target}"
    said = f"{why}: went back from step {step} to {where}, and on past the places between"
    return GoBack(Back(target, step - begin.order_from, begin.growth, met, said, tries + 1))
