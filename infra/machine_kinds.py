"""The kinds of a Ray cluster's machines, by the names of what they have.

A kind is a custom resource that the machines of it are started with, such as ``ray start --resources='{"gpu-machine": 1}'``.
Ray tells nobody what its autoscaler may bring, so the head says it, by a resource such as ``brings/gpu-machine/GPU`` of 88.
"""

from __future__ import annotations

from collections.abc import Iterable

BRINGS = "brings/"


def kinds_of(resources: Iterable[str]) -> set[str]:
    """The kinds of machines that there are, or may be, among the names of all resources of a cluster."""
    custom = {name for name in resources if name not in ("CPU", "GPU", "memory", "object_store_memory") and ":" not in name}
    return {name.removeprefix(BRINGS).split("/")[0] for name in custom}


def why_none(kind: str | None, resources: Iterable[str]) -> str | None:
    """Why nothing would ever run on machines of a kind, with the fix; None where there are some, or some may come."""
    known = kinds_of(resources)
    if kind is None or kind in known:
        return None
    others = f", or name one of {', '.join(sorted(known))}" if known else ""
    return f"no machine of the Ray cluster has the resource {kind}; start one with --resources='{{\"{kind}\": 1}}'{others}"
