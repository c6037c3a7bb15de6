"""How long a training stands still when it loses a worker or a machine: a cluster of Ray's own test kit on this machine.

Its head has no CPUs, and two nodes have one each; a training of two workers takes a few steps and loses one of them, once in each
way. All seconds are of wall time, on the driver's clock. `extra` is what passes from the loss to the next new step beyond what a
first start takes from the call to its first step, the median of those of the four trainings.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import torch
import typer

from benchmarks.before import ROOT, commit_of
from benchmarks.frame import Result, machine, progress
from tests.training.synthetic import KeepIn, config, write_shards
from training.history import Row, read_history
from training.job import TrainJob

STEPS_BEFORE, STEPS_AFTER, CHECKPOINT_EVERY = 20, 20, 10


@contextmanager
def small_cluster(nodes: int = 2) -> Iterator[Any]:
    """A head without CPUs, and nodes with one each; this process is its driver."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_worker_niceness"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        environment = {"PYTHONPATH": str(ROOT)}
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def trainers(node: Any) -> list[psutil.Process]:
    """The processes that train on a node of the cluster."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [process for process in raylet.children() if "RayTrainWorker" in " ".join(process.cmdline())]


class Told(logging.Handler):
    """What the driver says, with the time."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((time.monotonic(), record.getMessage()))

    def when(self, words: str) -> float:
        return next(at for at, line in self.lines if words in line)


@dataclass
class Trial:
    """A training that loses something after some steps and is stopped once it has taken new ones.

    `first` is the time from the call to the first step, `again` that from the loss to the first new step, `lost_at` that of the
    loss, in seconds.
    """

    folder: Path
    lose: Callable[[], object]
    changes: dict[str, Any] = field(default_factory=dict)
    first: float = 0.0
    again: float = 0.0
    lost_at: float = 0.0
    told: Told = field(default_factory=Told)

    def run(self) -> Trial:
        from training.launch import train

        shards, keeper = write_shards(self.folder / "shards"), KeepIn(str(self.folder / "kept"))
        settings = config(
            steps=100_000, checkpoint_every=CHECKPOINT_EVERY, **{"workers": 2, "validation": {"fraction": 0}, **self.changes}
        )
        stop, plans, began = threading.Event(), [], time.monotonic()

        def plan() -> TrainJob:
            newest = max(keeper.steps(), default=None)
            plans.append(newest or 0)
            resume = keeper.fetch(newest, "") if newest is not None else None
            return TrainJob(settings, shards, str(self.folder / f"work-{len(plans)}"), keeper, resume)

        def on_row(row: Row) -> None:
            if len(plans) == 1:
                self.first = self.first or time.monotonic() - began
                if row["step"] >= STEPS_BEFORE and not self.lost_at:
                    self.lost_at = time.monotonic()
                    self.lose()
            elif row["step"] > plans[-1]:
                self.again = self.again or time.monotonic() - self.lost_at
                if row["step"] >= plans[-1] + STEPS_AFTER:
                    stop.set()

        logger = logging.getLogger("training")
        logger.addHandler(self.told)
        try:
            train(plan, on_row, stop)
        finally:
            logger.removeHandler(self.told)
        return self

    def losses(self) -> list[float]:
        """Of every step, as the last checkpoint has them."""
        newest = max((self.folder / "kept").glob("*/committed"), key=lambda path: int(path.parent.name)).parent
        return [row["loss"] for row in read_history(newest / "history.jsonl")]


def main(
    silent_after: Annotated[int, typer.Option(min=5, help="Seconds after which a stopped worker is given up.")] = 60,
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Seconds that a training loses with a worker killed, stopped, termed, and with a node removed."""
    words = machine(torch.device("cpu"))
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory(prefix="deadnode-") as scratch, small_cluster() as cluster:
        last = min(cluster.worker_nodes, key=lambda node: node.node_id)

        def send(number: int) -> Callable[[], object]:
            return lambda: [process.send_signal(number) for process in trainers(last)]

        ways: dict[str, tuple[Callable[[], object], dict[str, Any]]] = {
            "killed": (send(signal.SIGKILL), {}),
            "termed": (send(signal.SIGTERM), {}),
            "stopped": (send(signal.SIGSTOP), {"silent_after": silent_after}),
            "node": (lambda: cluster.remove_node(last, allow_graceful=False), {"workers": {"min": 1, "max": 2}}),
        }
        trials = {}
        for name, (lose, changes) in ways.items():
            folder = Path(scratch, name)
            folder.mkdir()
            trials[name] = Trial(folder, lose, changes).run()
            progress(f"{name}: first step after {trials[name].first:.1f} s, the next new one {trials[name].again:.1f} s after")
        # Each was interrupted at a step of its own, and one goes on with another number of workers.
        losses = list(zip(*(trial.losses() for trial in trials.values()), strict=False))
    firsts = {name: round(trial.first, 1) for name, trial in trials.items()}
    first = median(firsts.values())
    figures = {"first_start_s": first, **{f"{name}_extra_s": trial.again - first for name, trial in trials.items()}}
    stopped = trials["stopped"]
    figures["stopped_detect_s"] = stopped.told.when("no sign of life") - stopped.lost_at
    figures = {name: round(value, 1) for name, value in figures.items()}
    figures |= {"steps_compared": len(losses), "loss_difference": max(max(step) - min(step) for step in losses)}
    told = {name: [line for _, line in trial.told.lines if "going on" in line] for name, trial in trials.items()}
    details = {
        "commit": commit_of(),
        "silent_after": silent_after,
        "told": told,
        "first_starts_s": firsts,
    }
    ratio = round(max(figures[f"{name}_extra_s"] for name in ("killed", "termed", "node")) / 30, 3)
    Result("deadnode", ratio, "30_s", figures, words, details).finish(file)


if __name__ == "__main__":
    typer.run(main)
