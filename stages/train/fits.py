"""Whether what is kept of one training can go on in another, told from what the two are trained with, before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from training.begin import Kept

# Of the model, what decides the shapes of its weights.
SHAPE = ("width", "depth", "heads", "patch", "data_type_token")


class Other(NamedTuple):
    """What it is that cannot go on, the change in the configuration that makes it so, and what a person can do instead."""

    what: str
    change: str
    mend: str


def other_network(old: Mapping[str, Any], new: Mapping[str, Any]) -> Other | None:
    """Why no weights of a training fit into those of another; None where they do.

    Args:
        old, new: `result_fields` of their configurations.
    """
    for name in SHAPE:
        was, now = old["model"][name], new["model"][name]
        if was != now:
            return Other(f"a model of another {name}", f"model.{name}: {was!r} -> {now!r}", "write the same, or leave `from` out")
    return None


def other_optimizer(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The change after which nothing that the optimizer has kept can go on; None where it can. Arguments as `other_network`."""
    was, now = old["optimizer"]["kind"], new["optimizer"]["kind"]
    return f"optimizer.kind: {was!r} -> {now!r}" if was != now else None


def why_not(old: Mapping[str, Any], new: Mapping[str, Any], keep: Collection[Kept]) -> str | None:
    """Why what is kept cannot go on, but for the order, with what would make it fit; None where it can. Arguments as
    `other_network`."""
    if (other := other_network(old, new)) is not None:
        return f"from: {other.what} cannot go on from it ({other.change}): {other.mend}"
    if "optimizer" in keep and (change := other_optimizer(old, new)) is not None:
        return f"from: what an optimizer keeps is of no use to another ({change}); leave it out of keep"
    return None
