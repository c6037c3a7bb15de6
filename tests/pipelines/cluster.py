"""The demo's recipe on a cluster that loses machines, against the same on one machine.

`unshare --net --pid --fork --kill-child --mount-proc python -m tests.pipelines.cluster FOLDER --json FILE`
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.counted import counted_s3
from benchmarks.frame import machine
from examples.little_web.build import build
from examples.little_web.server import LittleWeb
from infra.store import Store
from pipelines.commands.demo import HOST, RECIPE
from tests.pipelines.losses import Losses, compared, files_of, in_tmp, left_behind, timed
from tests.pipelines.standing import NODES, OUTSIDE, standing
from tests.stages.machines import ALONE, network

LINKS = 240
STEPS, EVERY = 60, 20


def settings(web: str) -> list[str]:
    """The demo, smaller: all its stages, and both sizes of pictures."""
    trained = {
        "steps": STEPS, "checkpoint_every": EVERY, "log_every": 5, "validation.every": EVERY, "validation.samples": 16,
        "schedule.warmup_steps": 5, "preview.count": 2,
    }  # fmt: skip
    return [
        "subsets.little.select.metadata=['s3://data/web/metadata/part-*.parquet']",
        "evaluate.prompts='s3://data/web/held_out.parquet'",
        f"subsets.little.download.hosts={{'{HOST}': '{web}'}}",
        "subsets.little.select.shard_rows=16",
        "subsets.little.download.workers=null",
        "text-codec.steps=30", "text-codec.warmup_steps=5", "text-codec.validate_every=30", "text-codec.validation_captions=16",
        *(f"train.{name}.{field}={value}" for name in (256, 512) for field, value in trained.items()),
        f"train.512.schedule.decay_steps={STEPS}",
        "evaluate.count=8", "evaluate.steps=5",
    ]  # fmt: skip


def command(store: str, web: str, *more: str) -> list[str]:
    wanted = [word for setting in settings(web) for word in ("--set", setting)]
    return [f"{Path(sys.executable).parent}/unidiffuser", "run", str(RECIPE), "--store", store, *wanted, *more]


def prepared(folder: Path, links: int = LINKS) -> Path:
    """A little web, of which metadata and prompts are in the bucket."""
    web = build(folder / "web", rows=links, seed=0)
    outside = Store("s3://data/web")
    for file in (*web.glob("metadata/*"), web / "held_out.parquet"):
        outside.write(str(file.relative_to(web)), file.read_bytes())
    return web


def own_tmp(folder: Path) -> None:
    """From now on this process and its children have a /tmp of their own, which is empty, or holds the folder alone."""
    folder.mkdir(parents=True, exist_ok=True)
    script = 'mount --bind "$0" /mnt && mount -t tmpfs tmpfs /tmp && mkdir -p "$0" && mount --move /mnt "$0"'
    subprocess.run(["sh", "-c", script, folder], check=True)


class Play:
    """Runs of the recipe by the command, one after the other, each said in a log of its own."""

    def __init__(self, folder: Path, web: str) -> None:
        self.folder, self.web, self.count = folder, web, 0

    def run(self, store: str, until: str, environment: Mapping[str, str]) -> int:
        self.count += 1
        with (self.folder / "logs" / f"run-{self.count}.log").open("w") as said:
            given = command(store, self.web, "--until", until)
            return subprocess.run(given, cwd=self.folder, env={**os.environ, **environment}, stdout=said, stderr=said).returncode

    def to_its_end(self, store: str, until: str, environment: Mapping[str, str], tries: int) -> int:
        """Give the command again until it ends well; how often it was given."""
        for number in range(1, tries + 1):
            if self.run(store, until, environment) == 0:
                return number
            print(f"run {self.count} failed: {self.last_line()}", flush=True)
        raise SystemExit(f"error: {tries} commands have failed; see {self.folder}/logs")

    def went_on(self) -> list[str]:
        """What the runs have said of work that was lost and done again."""
        lines = [line for file in sorted(self.folder.glob("logs/run-*.log")) for line in file.read_text().split("\n")]
        return [line for line in lines if "going on from the newest checkpoint" in line or "has lost the job" in line]

    def last_line(self) -> str:
        lines = (self.folder / "logs" / f"run-{self.count}.log").read_text().split("\n")
        return next((line for line in lines if "error" in line or "failed" in line), lines[-1])[:300]


def on_the_cluster(play: Play, folder: Path, until: str, calm: bool) -> dict[str, Any]:
    store = Store("s3://data/runs")
    with standing(folder) as cluster:
        cluster.lead()
        cluster.join(NODES)
        losses = Losses(cluster, store)
        watching = threading.Thread(target=losses.watch, daemon=True)
        if not calm:
            watching.start()
        tries, seconds = timed(lambda: play.to_its_end(store.root, until, cluster.environment, 3))
        losses.over.set()
        left = left_behind(cluster, store)
    return {"commands": tries, "seconds": seconds, "losses": losses.rows, "said": play.went_on(), "left": left}


def trained(store: Store) -> dict[str, Any]:
    """What the history of each training tells: a row for every interval, once."""
    told = {}
    for node, (dataset, _) in files_of(store).items():
        if dataset.manifest.stage == "train":
            with dataset.open(dataset.file("history.jsonl")) as file:
                rows = [json.loads(line) for line in file]
            steps = [row["step"] for row in rows if row["kind"] == "train"]
            losses = [row["loss"] for row in rows if row["kind"] == "validation"]
            told[node] = {"steps": steps[-1], "each_once": steps == list(range(5, STEPS + 1, 5)), "validation_losses": losses}
    return told


def at_work() -> list[str]:
    """The processes that are there beside this one and what it is held by; the dead, whom nobody has asked for, are not."""
    own = {os.getpid(), os.getppid(), resource_tracker._resource_tracker._pid}  # type: ignore[attr-defined]
    processes = [each for each in psutil.process_iter() if each.pid not in own and each.status() != psutil.STATUS_ZOMBIE]
    return [" ".join(each.cmdline())[:100] for each in processes]


def holds(result: dict[str, Any], losses: int) -> bool:
    """Whether all is as it must be."""
    left = result["cluster"]["left"]
    return (
        result["one_machine"]["code"] == 0
        and len(result["cluster"]["losses"]) == losses
        and all(row["damaged"] == 0 and (row["equal"] or not row["must_be_equal"]) for row in result["nodes"])
        and all(told["each_once"] for side in result["trainings"].values() for told in side.values())
        and not any([*left.values(), result["left_in_tmp"], result["processes_left"]])
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.pipelines.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--until", default="export", help="the last node that is made, by default all are")
    parser.add_argument("--calm", action="store_true", help="nothing is lost")
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = arguments.folder.resolve()
    result: dict[str, Any] = {
        "command": f"{ALONE} python -m tests.pipelines.cluster FOLDER",
        "machine": machine(torch.device("cpu")),
    }
    with ExitStack() as stack:
        stack.enter_context(network())
        own_tmp(folder)
        there = {*in_tmp(Path("/tmp"))}
        stack.enter_context(counted_s3(OUTSIDE))
        web = stack.enter_context(LittleWeb(prepared(folder), host=OUTSIDE))
        play = Play(folder, web.address)
        result["cluster"] = on_the_cluster(play, folder, arguments.until, arguments.calm)
        print(json.dumps(result["cluster"]), flush=True)
        code, seconds = timed(lambda: play.run(str(folder / "single"), arguments.until, {}))
        result["one_machine"] = {"code": code, "seconds": seconds}
        calm, ours = Store(str(folder / "single")), Store("s3://data/runs")
        result["nodes"] = compared(ours, calm)
        result["trainings"] = {"cluster": trained(ours), "one_machine": trained(calm)}
    result["left_in_tmp"] = sorted({*in_tmp(Path("/tmp"))} - there)
    result["processes_left"] = at_work()
    print(json.dumps(result, indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(not holds(result, 0 if arguments.calm else 3))


if __name__ == "__main__":
    main()
