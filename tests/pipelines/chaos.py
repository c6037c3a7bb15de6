"""SIGKILL at random moments over select, download and filter: `python -m tests.pipelines.chaos FOLDER --kills 50 --json FILE`.

The stages run once undisturbed. Then they run in another store, over and over until there were enough kills: at a random moment
of a run one of these dies, and after it the command is given again, until it ends well:

    command   the flow's own process
    job       the driver of the Ray job that is at work
    worker    one process of Ray's that does the work
    node      all of Ray at once, as when a machine goes down

At the end of each of these stories every dataset must hold the same files, by sha256, as the undisturbed one, each file must be
as its manifest says, no process may be left, and no run may be left Running.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from examples.little_web.build import build
from examples.little_web.server import LittleWeb
from infra.dataset import all_datasets, verify
from infra.store import Store
from tests.pipelines.conftest import Command, start, survivors
from tests.pipelines.interruptions import content

ROWS = 110
KINDS = ("command", "job", "worker", "node")
# Seconds from the first word of a command, or from a kill that it survived, to the next kill, at most.
LATEST = 8.0
PATIENCE = 300.0
RECIPE = """
name: chaos
subsets:
  little:
    select: {metadata: [web/metadata/part-*.parquet], min_side: 256, shard_rows: 16}
    download: {image_size: 320, timeout: 5, deadline: 20, retries: 0, workers: 1, threads: 4}
    filter: {min_side: 256, workers: 1}
"""


class Watched:
    """A command of which every line is read as it comes."""

    def __init__(self, command: Command) -> None:
        self.process, self.lines = command.process, command.lines
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def speaks(self) -> None:
        """Wait for its first line: by then it has servers, and work."""
        while not self.lines and self.process.poll() is None:
            time.sleep(0.05)

    def ends_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.process.poll() is not None


def victims(kind: str, command: Watched, store: Path, rng: random.Random) -> list[psutil.Process]:
    """The processes to kill; none where there is none of the kind at this moment."""
    if kind == "command":
        return [psutil.Process(command.process.pid)]
    found = []
    for process in survivors(store):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if kind == "job" and words[1:3] == ["-m", "stages"]:
            found.append(process)
        if kind == "worker" and words and words[0].startswith("ray::"):
            found.append(process)
        if kind == "node" and not any("prefect" in word for word in words):
            found.append(process)
    return rng.sample(found, 1) if found and kind == "worker" else found


def kill(kind: str, command: Watched, store: Path, rng: random.Random) -> dict[str, Any] | None:
    """Kill something as soon as there is something of the kind, and say what; None if the command ended before."""
    while not (chosen := victims(kind, command, store, rng)):
        if command.ends_within(0.1):
            return None
    if command.process.poll() is not None:
        return None
    said = command.lines[-1] if command.lines else ""
    for process in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return {"kind": kind, "processes": len(chosen), "said": said[:80]}


def digests(store: Store) -> dict[str, dict[str, str]]:
    """Node -> unit and name -> sha256 of every file of its dataset, all of which are as their manifest says."""
    found = {}
    for dataset in all_datasets(store):
        assert (problems := verify(dataset)) == [], problems
        found[dataset.manifest.node] = {f"{entry.unit}/{entry.name}": content(dataset, entry) for entry in dataset.files}
    return found


def left_running(store: Path) -> int:
    """Flow runs that Prefect still takes to be going on."""
    with sqlite3.connect(f"file:{store}/.state/prefect/prefect.db?mode=ro", uri=True) as database:
        ((count,),) = database.execute("select count(*) from flow_run where state_type in ('RUNNING', 'PENDING', 'CANCELLING')")
    return int(count)


def story(arguments: list[str | Path], store: Path, kinds: list[str], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Run to the end in an empty store, with kills of these kinds on the way, as many as it takes to get there; a row a kill."""
    waiting = list(kinds)
    while True:
        command = Watched(start("run", *arguments, "--store", store))
        began = time.monotonic()
        command.speaks()
        while waiting and not command.ends_within(rng.uniform(0, LATEST)):
            row = kill(waiting[0], command, store, rng)
            if row is not None:
                waiting.pop(0)
                yield {**row, "seconds_in": round(time.monotonic() - began, 1)}
        assert command.ends_within(PATIENCE), f"the command does not end:\n{command.lines[-20:]}"
        command.reader.join()
        if command.process.returncode == 0:
            return


def trial(folder: Path, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """A row a kill, and after every story one with what is wrong: nothing, one hopes."""
    build(folder / "web", rows=ROWS, seed=0)
    recipe, calm = folder / "chaos.yaml", folder / "calm"
    recipe.write_text(RECIPE)
    rng = random.Random(seed)
    with LittleWeb(folder / "web") as web:
        arguments: list[str | Path] = [recipe, "--set", f"subsets.little.download.hosts={{little-web.example: '{web.address}'}}"]
        code, printed = start("run", *arguments, "--store", calm).finish()
        assert code == 0, printed
        wanted = digests(Store(str(calm)))
        # Every kind comes as often as the others.
        kinds = [kind for _ in range(kills) for kind in rng.sample(KINDS, len(KINDS))][:kills]
        while kinds:
            store = folder / f"disturbed-{len(kinds)}"
            rows = list(story(arguments, store, kinds[:5], rng))
            yield from rows
            kinds = kinds[len(rows) :]
            found = digests(Store(str(store)))
            yield {
                "nodes": len(found),
                "nodes_that_differ": sorted(node for node in wanted | found if wanted.get(node) != found.get(node)),
                "processes_left": len(survivors(store)),
                "runs_left_running": left_running(store),
            }
            shutil.rmtree(store)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pipelines.chaos", description=__doc__)
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    rows = []
    for row in trial(arguments.folder.resolve(), arguments.kills, arguments.seed):
        print(json.dumps(row), flush=True)
        rows.append(row)
    kinds = Counter(row["kind"] for row in rows if "kind" in row)
    stories = [row for row in rows if "nodes" in row]
    wrong = sum(bool(row["nodes_that_differ"] or row["processes_left"] or row["runs_left_running"]) for row in stories)
    facts = {
        "command": f"python -m tests.pipelines.chaos FOLDER --kills {arguments.kills} --seed {arguments.seed}",
        "cores": os.cpu_count(),
        "kills": dict(kinds),
        "stories": len(stories),
        "stories_with_something_wrong": wrong,
    }
    print(json.dumps(facts))
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
