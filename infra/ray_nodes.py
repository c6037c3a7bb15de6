"""The machines of a Ray cluster of one kind: those that are there, and those that its autoscaler may bring.

A kind is a custom resource that the machines of it are started with, such as ``ray start --resources='{"gpu-machine": 1}'``.
Ray tells nobody what its autoscaler may bring, so the head says it, by a resource such as ``brings/gpu-machine/GPU`` of 88.
"""

from __future__ import annotations

import ray

# What a worker takes of the resource that marks its machines: so little that it bounds nothing.
SHARE = 0.001
BRINGS = "brings/"


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


def kinds() -> set[str]:
    """The kinds of machines that there are, or may be."""
    names = ray.cluster_resources()
    custom = {name for name in names if name not in ("CPU", "GPU", "memory", "object_store_memory") and ":" not in name}
    return {name.removeprefix(BRINGS).split("/")[0] for name in custom}


def missing(kind: str | None) -> str | None:
    """Why nothing would ever run on machines of a kind, with the fix; None where there are some, or some may come."""
    if kind is None or kind in kinds():
        return None
    known = f", or name one of {', '.join(sorted(kinds()))}" if kinds() else ""
    return f"no machine of the Ray cluster has the resource {kind}; start one with --resources='{{\"{kind}\": 1}}'{known}"
