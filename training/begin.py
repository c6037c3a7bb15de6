"""What a run takes of the checkpoint that it begins from, and where its counts then stand.

    weights     the weights as trained
    optimizer   the optimizer's state, and how many steps it has taken; without it, it begins empty
    ema         the moving average, and how many updates it has had; without it, it begins at the weights
    schedule    the learning rate goes on at its step; without it, the warm-up comes again
    order       rows, captions, timesteps and noise go on at their place; without it, they begin at place 0

The count of steps goes on with the schedule or the order, and with it the history; with neither it begins at 0. With all of
them a run is the same, to the last bit, as the one that wrote the checkpoint would have been.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

Kept = Literal["weights", "optimizer", "ema", "schedule", "order"]
ALL: tuple[Kept, ...] = get_args(Kept)


class Growth(NamedTuple):
    """From the first epoch that begins at `place` or after it, the first `parts` of the data are read."""

    place: int
    parts: int


class Stood(Protocol):
    """What a checkpoint says of where its counts stood."""

    step: int
    schedule_from: int
    order_from: int
    growth: list[Growth]


@dataclass(frozen=True)
class Begin:
    """Where the counts of a run stand when it begins: the steps done, the steps at which the schedule and the order began, and
    how many shards there were, by place of the order."""

    step: int = 0
    schedule_from: int = 0
    order_from: int = 0
    growth: tuple[Growth, ...] = ()


def counts_on(keep: Collection[Kept]) -> bool:
    """Whether the count of steps goes on."""
    return "schedule" in keep or "order" in keep


def begin(saved: Stood | None, keep: Collection[Kept], shards: int, global_batch: int) -> Begin:
    """Where a run begins.

    Args:
        saved: the state of the checkpoint that it begins from; None for none.
        keep: what it takes of that.
        shards: of this run; where the order is kept, those of the checkpoint come first.
        global_batch: samples a step.
    """
    fresh = (Growth(0, shards),)
    if saved is None or not counts_on(keep):
        return Begin(growth=fresh)
    schedule_from = saved.schedule_from if "schedule" in keep else saved.step
    if "order" not in keep:
        return Begin(saved.step, schedule_from, saved.step, fresh)
    growth = tuple(saved.growth)
    if shards > growth[-1].parts:
        growth += (Growth((saved.step - saved.order_from) * global_batch, shards),)
    return Begin(saved.step, schedule_from, saved.order_from, growth)
