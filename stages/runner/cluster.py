"""What a Ray cluster is at the moment, for the pool: how many workers fit, and why one that was asked for does not come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import ray

from infra.ray_nodes import marked, may_come, total
from stages.runner.contract import Resources

KINDS = ("CPU", "GPU")


@dataclass(frozen=True)
class Cluster:
    """Nodes that are alive, as what each has in all, by id; and what is free of all of them."""

    nodes: Mapping[str, Mapping[str, float]]
    free: Mapping[str, float]

    @classmethod
    def seen(cls) -> Cluster:
        """The one that this process is connected to, now."""
        return cls({node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}, ray.available_resources())

    def fits(self, resources: Resources) -> int:
        """Workers that the nodes hold, each of them whole on one node."""
        return sum(_on_one(node, resources) for node in self.nodes.values())

    def capped(self, resources: Resources) -> Resources:
        """What a worker asks for, but no more CPUs and memory than one node has: the one that has most of the memory.

        CPUs change the pace alone, and a worker may do with less memory than it declares. While no node takes work, it is left
        as it is: nobody knows what will come.
        """
        able = [node for node in self._of_kind(resources) if node.get("CPU") and node.get("GPU", 0) >= resources.gpus]
        held = [(min(resources.memory, node.get("memory", 0.0)), min(resources.cpus, node["CPU"])) for node in able]
        if not held:
            return resources
        memory, cpus = max(held)
        return replace(resources, cpus=cpus, memory=memory)

    def why_not(self, resources: Resources) -> str:
        """What stands in the way of one more worker."""
        asked = f"a worker takes {told(resources)}"
        if self.fits(resources):
            total = [sum(node.get(kind, 0.0) for node in self.nodes.values()) for kind in KINDS]
            held = f" and {self._free('memory') / 2**30:.1f} GiB" if resources.memory else ""
            return f"{asked}, and of {_told(*total)} only {_told(*map(self._free, KINDS))}{held} are free"
        largest = max(([node.get(kind, 0.0) for kind in KINDS] for node in self._of_kind(resources)), key=sum, default=[0.0, 0.0])
        if not any(largest):
            which = f"with the resource {resources.machines}" if resources.machines else "of the cluster"
            return f"{asked}, and no node {which} takes work; add one"
        return f"{asked}, and the largest node has {_told(*largest)}; add a larger one"

    def _of_kind(self, resources: Resources) -> list[Mapping[str, float]]:
        """What the nodes have that workers may be on."""
        return [node for node in self.nodes.values() if resources.machines is None or node.get(resources.machines)]

    def _free(self, kind: str) -> float:
        return self.free.get(kind, 0.0)


def gpus_each(machines: str | None) -> float:
    """GPUs that one worker of a model takes: a whole one wherever its machines have any, or would when the cluster grows."""
    return 1.0 if total("GPU", machines) or may_come("GPU", machines) else 0.0


def told(resources: Resources) -> str:
    """``4 CPUs and 1 GPUs and 2.0 GiB``"""
    return _told(resources.cpus, resources.gpus) + (f" and {resources.memory / 2**30:.1f} GiB" if resources.memory else "")


def _told(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs" if gpus else f"{cpus:g} CPUs"


def _on_one(node: Mapping[str, float], resources: Resources) -> int:
    asked = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory, **marked(resources.machines)}
    return min(int(node.get(kind, 0.0) / amount + 1e-9) for kind, amount in asked.items() if amount)
