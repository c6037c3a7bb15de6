"""Machines of a cluster that are lost and come, and a store that is out of order, while a node is made.

`unshare --net --pid --fork --kill-child --mount-proc python -m tests.stages.chaos FOLDER --rounds 3 --json FILE`

The cluster is a head without CPUs and two machines of one CPU, see `tests.stages.machines`; the store is on an S3 server. Each
node is made once undisturbed, and then in every round once with each of these, at a random moment:

    killed     a machine that is at work ends, and none comes in its place
    added      a third one comes
    busy       the S3 server answers 503 for ten seconds, to the workers and to the command
    cut        for half a minute nothing passes between a machine that is at work and all others

The files must be those of a run in one process, by sha256. Of a training it is the weights that count, and they must be those of
the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.counted import KEYS, Counted, counted_s3
from benchmarks.frame import machine
from infra.dataset import Dataset
from infra.ray_cluster import PATIENT
from infra.store import Store
from stages.runner.run import run_stage
from tests.stages import killed
from tests.stages.machines import ALONE, HEAD, Machine, head, network
from tests.stages.scenes import Scene, Scenes, found

ROOT = Path(__file__).parent.parent.parent
STAGES = ("select", "download", "filter", "encode", "train")
FAULTS = ("killed", "added", "busy", "cut")
MACHINES = 2
BUSY, CUT = 10.0, 30.0
# Seconds after which a run that is not over is taken to hang.
HANGS = 240.0
# The part of an undisturbed run in which the fault comes.
WITHIN = 0.8


class Stand:
    """The cluster and the server on which a scene is played."""

    def __init__(self, cluster: str, s3: Counted, chance: random.Random) -> None:
        self.cluster, self.s3, self.chance = cluster, s3, chance
        self.machines: list[Machine] = []

    def tidy(self) -> None:
        """As many machines as at the beginning."""
        while len(self.machines) > MACHINES:
            self.machines.pop(0).leave()
        while len(self.machines) < MACHINES:
            self.machines.append(Machine(self.cluster).known())

    def at_work(self) -> Machine:
        return self.chance.choice([each for each in self.machines if each.works()] or self.machines)

    def killed(self) -> None:
        lost = self.at_work()
        self.machines.remove(lost)
        lost.kill()

    def added(self) -> None:
        self.machines.append(Machine(self.cluster))

    def busy(self) -> None:
        until = time.monotonic() + BUSY
        self.s3.busy = lambda: time.monotonic() < until

    def cut(self) -> None:
        with self.at_work().cut_off():
            time.sleep(CUT)


@contextmanager
def driver(cluster: str, stage: str) -> Iterator[None]:
    import ray

    variables = {name: os.environ[name] for name in (*KEYS, "AWS_ENDPOINT_URL")} | {"PYTHONPATH": str(ROOT)} | PATIENT
    hook = f"tests.stages.paced.{'steps' if stage == 'train' else 'units'}"
    ray.init(
        address=cluster, _node_ip_address=HEAD, log_to_driver=False,
        runtime_env={"env_vars": variables, "worker_process_setup_hook": hook},
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def aside(work: Callable[[], Dataset]) -> Future[Dataset]:
    """Do it in a thread that the process does not wait for at its end."""
    done: Future[Dataset] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def begun(store: Store, stage: str) -> bool:
    """Whether a worker is at a unit, or one is done."""
    return any(store.walk(".state/leases")) or any(path.endswith("unit.json") for path, *_ in store.walk(stage))


def played(scene: Scene, store: Store, disturb: Callable[[], None], after: float) -> dict[str, Any]:
    """Make the node in a store of its own, disturbed some seconds after it has begun; what came of it."""
    for path in scene.inputs:
        store.write(path, scene.store.read(path))
    start = time.monotonic()
    row: dict[str, Any] = {"after": round(after, 1), "came": False}
    running = aside(lambda: run_stage(scene.planned, store, scene.stage))
    while not running.done() and not begun(store, scene.stage.name):
        time.sleep(0.1)
    first = time.monotonic()
    while not running.done() and time.monotonic() < first + after:
        time.sleep(0.05)
    row["came"] = not running.done()
    disturb()
    try:
        files = found(running.result(HANGS))
        scene.wanted.update({} if scene.wanted else files)
        row["equal"] = files == scene.wanted
    except TimeoutError:
        # It cannot be ended, so nothing after it would mean anything.
        raise SystemExit(
            f"{scene.stage.name} is not over {HANGS:.0f} s after what came {after:.1f} s after its beginning"
        ) from None
    except Exception as error:
        row |= {"equal": False, "error": " ".join(str(error).split())[:300]}
    ended = time.monotonic()
    return row | {"seconds": round(ended - start, 1), "worked": round(ended - first, 1)}


def rounds_of(scene: Scene, stand: Stand, faults: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """A row a run: the undisturbed one, and those with each fault."""
    name = scene.stage.name
    stand.tidy()
    calm = played(scene, Store(f"s3://data/{name}-calm"), lambda: None, 0.0)
    yield {"stage": name, "fault": "none", "round": 0, **calm}
    for number in range(rounds):
        for fault in faults:
            stand.tidy()
            after = stand.chance.uniform(0, WITHIN * calm["worked"])
            store = Store(f"s3://data/{name}-{fault}-{number}")
            yield {"stage": name, "fault": fault, "round": number, **played(scene, store, getattr(stand, fault), after)}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pairs = list(dict.fromkeys((row["stage"], row["fault"]) for row in rows))
    told = []
    for stage, fault in pairs:
        of = [row for row in rows if (row["stage"], row["fault"]) == (stage, fault)]
        seconds = [row["seconds"] for row in of]
        told.append(
            {
                "stage": stage,
                "fault": fault,
                "rounds": len(of),
                "equal": sum(row["equal"] for row in of),
                "came_in_time": sum(row["came"] for row in of),
                "seconds": median(seconds),
                "longest": max(seconds),
            }  # fmt: skip
        )
    return told


def play(arguments: argparse.Namespace, stack: ExitStack) -> Iterator[dict[str, Any]]:
    stack.enter_context(network())
    # Ray's processes begin while this one is small.
    cluster = stack.enter_context(head())
    s3 = stack.enter_context(counted_s3(HEAD))
    scenes = Scenes(arguments.folder, Store("s3://data/outside"), HEAD, stack)
    with patch("stages.runner.pool.run_pool", killed.in_process):
        made = {stage: scenes(stage) for stage in arguments.stages}
    stand = Stand(cluster, s3, random.Random(arguments.seed))
    stack.callback(lambda: [each.kill() for each in stand.machines])
    for stage, scene in made.items():
        with driver(stand.cluster, stage):
            yield from rounds_of(scene, stand, arguments.faults, arguments.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.stages.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--rounds", type=int, default=3, help="of every stage with every fault")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    # What it has begun ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    os.environ["RAY_worker_niceness"] = "0"
    # As a worker of one CPU has it: some processors round otherwise where there are more.
    torch.set_num_threads(1)
    command = f"{ALONE} python -m tests.stages.chaos FOLDER --rounds {arguments.rounds} --seed {arguments.seed}"
    facts = {"command": command, "machine": machine(torch.device("cpu")), "isolation": "network, process and mount namespaces"}
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for row in play(arguments, stack):
            print(json.dumps(row), flush=True)
            rows.append(row)
            # What was found stays where a later run hangs.
            if arguments.json:
                record = {**facts, "pairs": summary(rows), "rows": rows}
                arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    main()
