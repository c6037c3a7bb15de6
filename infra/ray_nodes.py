"""The machines of a Ray cluster of one kind: those that are there, and those that its autoscaler may bring."""

from __future__ import annotations

import ray

from infra.machine_kinds import BRINGS, why_none

# What a worker takes of the resource that marks its machines: so little that it bounds nothing.
SHARE = 0.001


def marked(kind: str | None) -> dict[str, float]:
    """What a worker asks for besides CPUs and GPUs, to be on machines of a kind; None means any."""
    return {kind: SHARE} if kind else {}


def total(resource: str, kind: str | None = None) -> float:
    """How much of a resource the machines of a kind have in all, now."""
    if kind is None:
        return ray.cluster_resources().get(resource, 0.0)
    there = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return sum(have.get(resource, 0.0) for have in there if have.get(kind))


def free(resource: str, kind: str | None = None) -> float:
    """How much of it nobody has, now."""
    if kind is None:
        return ray.available_resources().get(resource, 0.0)
    nodes = ray._private.state.available_resources_per_node().values()
    return sum(have.get(resource, 0.0) for have in nodes if have.get(kind))


def may_come(resource: str, kind: str | None = None) -> float:
    """How much of it machines of a kind would have if the autoscaler brought all that it may; 0 where there is none."""
    found = 0.0
    for name, amount in ray.cluster_resources().items():
        if name.startswith(BRINGS):
            told, what = name.removeprefix(BRINGS).split("/")
            found += amount if what == resource and kind in (None, told) else 0.0
    return found


def missing(kind: str | None) -> str | None:
    """See `infra.machine_kinds.why_none`."""
    return why_none(kind, ray.cluster_resources())
