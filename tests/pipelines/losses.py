"""What the cluster of `tests.pipelines.cluster` loses while a run is at work, and what is left of the run when it is over."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.dataset import Dataset, all_datasets, verify
from infra.processes import ServerError
from infra.store import Store, StoreError
from tests.pipelines.standing import Standing
from tests.stages.machines import Machine

# What Ray and torch keep there for the next job, and Python for a process that lives.
CACHES = re.compile(r"ray|home|torchinductor_.*|pymp-.*")
# Stages whose files are the same wherever they are made.
EQUAL = ("select", "download", "filter", "text-codec", "encode")


@dataclass
class Losses:
    """Takes machines away while a run is at work, once in each of three nodes, and puts others in their places."""

    cluster: Standing
    store: Store
    rows: list[dict[str, Any]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """To be called in a daemon thread, which does not end: the kernel kills the machines that a thread has begun with it."""
        self._take_away()
        threading.Event().wait()

    def _take_away(self) -> None:
        for stage, lose in (("encode", self._a_node), ("encode", self._head), ("train", self._a_node)):
            # Which of two nodes comes first is Prefect's choice.
            seen = {row["in"] for row in self.rows}
            while (node := self._at_work(stage, seen)) is None:
                if self.over.wait(0.3):
                    return
            before = self._units(stage)
            while self._units(stage) == before:
                if self.over.wait(0.3):
                    return
            began = time.monotonic()
            row = {"in": node, "units_done": self._units(stage) - before, **lose()}
            self.rows.append(row | {"seconds_until_replaced": round(time.monotonic() - began, 1)})
            print(self.rows[-1], flush=True)

    def _a_node(self) -> dict[str, Any]:
        lost = next((node for node in self.cluster.nodes if node.works()), self.cluster.nodes[0])
        worked = lost.works()
        address = self.cluster.lose(lost)
        self.cluster.join(1)
        return {"lost": f"node {address}", "at_work": worked}

    def _head(self) -> dict[str, Any]:
        self.cluster.lose_head()
        self.cluster.lead()
        return {"lost": "head", "at_work": True}

    def _at_work(self, stage: str, seen: Collection[str]) -> str | None:
        """A node of the recipe that is at work, of those of a stage that have lost nothing yet."""
        with suppress(ServerError):
            nodes = [job.rsplit("-", 2)[0] for job in self.cluster.ray.commands()]
            return next((node for node in nodes if stage in node.split("-") and node not in seen), None)
        return None

    def _units(self, stage: str) -> int:
        with suppress(StoreError):
            return sum(path.endswith("unit.json") for path, *_ in self.store.walk(stage))
        return 0


def files_of(store: Store) -> dict[str, tuple[Dataset, dict[str, str]]]:
    """Node -> its dataset, and its files with their sha256."""
    return {each.manifest.node: (each, {entry.name: entry.sha256 for entry in each.files}) for each in all_datasets(store)}


def compared(ours: Store, calm: Store) -> list[dict[str, Any]]:
    """A row a node of the recipe: whether its files are those of the undisturbed run on one machine, and whole."""
    found, wanted = files_of(ours), files_of(calm)
    rows = []
    for node, (dataset, files) in found.items():
        alike = wanted[node][1]
        rows.append(
            {
                "node": node,
                "same_fingerprint": dataset.manifest.fingerprint == wanted[node][0].manifest.fingerprint,
                "files": len(files),
                "equal_files": sum(alike.get(name) == sha256 for name, sha256 in files.items()),
                "must_be_equal": dataset.manifest.stage in EQUAL,
                "equal": files == alike,
                "damaged": len(verify(dataset)),
            }
        )
    return rows


def left_behind(cluster: Standing, store: Store) -> dict[str, Any]:
    """What is there after a run that was not there before it: jobs, workers, files for a time, leases."""
    until = time.monotonic() + 60
    while any(node.works() for node in cluster.nodes) and time.monotonic() < until:
        time.sleep(0.5)
    assert cluster.head is not None
    machines = [cluster.head, *cluster.nodes]
    return {
        "jobs_at_work": len(cluster.ray.running()),
        "machines_with_workers": [node.address for node in cluster.nodes if node.works()],
        "files_in_tmp": {machine.address: found for machine in machines if (found := in_tmp(_tmp(machine)))},
        "leases": sum(1 for _ in store.walk(".state/leases")),
    }


def _tmp(machine: Machine) -> Path:
    """A machine's own folder for files of a time."""
    return Path(f"/proc/{machine.processes()[-1].pid}/root/tmp")


def in_tmp(folder: Path) -> list[str]:
    """What lies there and should not any more."""
    return sorted(name for name in os.listdir(folder) if not CACHES.fullmatch(name))


def timed(work: Callable[[], int]) -> tuple[int, float]:
    began = time.monotonic()
    return work(), round(time.monotonic() - began, 1)
