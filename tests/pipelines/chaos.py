"""SIGKILL at random moments of runs: `python -m tests.pipelines.chaos SCENE FOLDER --kills 50 --json FILE`.

A recipe runs once undisturbed. Then it runs in another store, over and over until there were enough kills: at a random moment
of a run a process dies, and the command is given again, until it ends well. There are two scenes.

`data`: select, download and filter by a command with servers of its own, where one of these dies:

    command      the command, which is the flow's process too
    job          the driver of the Ray job that is at work
    ray-worker   one process of Ray's that does the work
    ray          all of Ray at once, as when a machine goes down

`deployed`: a recipe from metadata to export as runs of a deployment, on the servers that `up` keeps, where one of these dies:

    flow         the flow's process, which the worker started
    worker       the Prefect worker
    server       the Prefect server
    job          as above

After every kill `up` is said again, while the command goes on following the run, if it still does.

At the end of each of these stories every dataset must hold the same files, by sha256, as the undisturbed one, each file must be
as its manifest says, no run may be left Running and no job at work, and when the servers are down, no process be left.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from examples.little_web.build import build
from examples.little_web.server import LittleWeb
from infra.dataset import all_datasets, verify
from infra.processes import recorded
from infra.ray_jobs import RayJobs
from infra.store import Store
from tests.pipelines.conftest import Command, start, survivors
from tests.pipelines.interruptions import content

ROWS = 110
PATIENCE = 900.0
# What died unseen is marked after three heartbeats of half a minute, and started again after ten seconds more.
SETTLING = 240.0
# How long a process may take that ends by itself.
ENDING = 5.0
RECIPE = """
name: chaos
subsets:
  little:
    select: {metadata: [web/metadata/part-*.parquet], min_side: 256, shard_rows: 16}
    download: {image_size: 320, timeout: 5, deadline: 20, retries: 0, workers: 1, threads: 4}
    filter: {min_side: 256, workers: 1}
"""


@dataclass(frozen=True)
class Scene:
    """What is disturbed, and how.

    Attributes:
        kinds: what dies, every kind as often as the others.
        kills: in a story, at most.
        latest: seconds from the first word of a command, or from a kill that it survived, to the next kill, at most.
        up: whether the servers are those that `unidiffuser up` keeps.
    """

    recipe: str
    kinds: tuple[str, ...]
    kills: int
    latest: float
    up: bool


SCENES = {
    "data": Scene(RECIPE, ("command", "job", "ray-worker", "ray"), kills=5, latest=8.0, up=False),
    "deployed": Scene(
        Path(__file__).with_name("recipe.yaml").read_text(), ("flow", "worker", "server", "job"), kills=8, latest=30.0, up=True
    ),
}


@dataclass(frozen=True)
class Undisturbed:
    """The arguments of a run, the store in which it ran, and what comes of it when nothing dies."""

    arguments: list[str | Path]
    store: Path
    wanted: dict[str, dict[str, str]]


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
    if kind in ("server", "worker"):
        server = recorded("prefect" if kind == "server" else kind, store / ".state")
        return [psutil.Process(server.pid)] if server is not None else []
    found = []
    for process in survivors(store):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if kind == "job" and words[1:3] == ["-m", "stages"]:
            found.append(process)
        if kind == "flow" and "prefect.engine" in words:
            found.append(process)
        if kind == "ray-worker" and words and words[0].startswith("ray::"):
            found.append(process)
        if kind == "ray" and not any("prefect" in word for word in words):
            found.append(process)
    return rng.sample(found, 1) if found and kind == "ray-worker" else found


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


def runs_left(store: Path) -> int:
    """Flow runs that Prefect still takes to be going on, or about to."""
    with sqlite3.connect(f"file:{store}/.state/prefect/prefect.db?mode=ro", uri=True) as database:
        query = "select count(*) from flow_run where state_type not in ('COMPLETED', 'FAILED', 'CRASHED', 'CANCELLED')"
        ((count,),) = database.execute(query)
    return int(count)


def jobs_left(store: Path) -> int:
    """Jobs that Ray still works at, where it is up."""
    server = recorded("ray", store / ".state")
    return len(RayJobs(server.address, server.token).running()) if server is not None else 0


def bring(word: str, store: Path) -> None:
    """`unidiffuser up` or `down`."""
    code, printed = start(word, "--store", store).finish()
    assert code == 0, printed


def named(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.Error:
        return "has ended since"


def story(
    scene: Scene, arguments: list[str | Path], store: Path, kinds: list[str], rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Run to the end in an empty store, with kills of these kinds on the way, as many as it takes to get there; a row a kill."""
    waiting = list(kinds)
    while True:
        if scene.up:
            bring("up", store)
        command = Watched(start("run", *arguments, "--store", store))
        began = time.monotonic()
        command.speaks()
        while waiting and not command.ends_within(rng.uniform(0, scene.latest)):
            row = kill(waiting[0], command, store, rng)
            if row is not None:
                waiting.pop(0)
                yield {**row, "seconds_in": round(time.monotonic() - began, 1)}
                if scene.up:
                    bring("up", store)
        assert command.ends_within(PATIENCE), f"the command does not end:\n{command.lines[-20:]}"
        command.reader.join()
        if command.process.returncode == 0:
            return


def ending(scene: Scene, store: Path, wanted: dict[str, dict[str, str]]) -> dict[str, Any]:
    """What is wrong at the end of a story."""
    began = time.monotonic()
    while scene.up and (runs_left(store) or jobs_left(store)) and time.monotonic() < began + SETTLING:
        time.sleep(0.5)
    settled = {"seconds_to_settle": round(time.monotonic() - began, 1)} if scene.up else {}
    left = {"runs_left": runs_left(store), "jobs_left": jobs_left(store)}
    if scene.up:
        bring("down", store)
    # A shell of Ray's that watches over a job looks once a second whether it may end.
    began = time.monotonic()
    while (left_over := survivors(store)) and time.monotonic() < began + ENDING:
        time.sleep(0.2)
    found = digests(Store(str(store)))
    return {
        "nodes": len(found),
        "nodes_that_differ": sorted(node for node in wanted | found if wanted.get(node) != found.get(node)),
        **left,
        "processes_left": len(left_over),
        **({"left_over": [named(process) for process in left_over]} if left_over else {}),
        **settled,
    }


@contextlib.contextmanager
def undisturbed(folder: Path, recipe: str) -> Iterator[Undisturbed]:
    """Run a recipe over a little web once; the web stays for as long as the block."""
    build(folder / "web", rows=ROWS, seed=0)
    path, calm = folder / "chaos.yaml", folder / "calm"
    path.write_text(recipe)
    with LittleWeb(folder / "web") as web:
        arguments: list[str | Path] = [path, "--set", f"subsets.little.download.hosts={{little-web.example: '{web.address}'}}"]
        code, printed = start("run", *arguments, "--store", calm).finish()
        assert code == 0, printed
        yield Undisturbed(arguments, calm, digests(Store(str(calm))))


def trial(scene: Scene, calm: Undisturbed, folder: Path, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """A row a kill, and after every story one with what is wrong: nothing, one hopes."""
    rng = random.Random(seed)
    kinds = [kind for _ in range(kills) for kind in rng.sample(scene.kinds, len(scene.kinds))][:kills]
    while kinds:
        store = folder / f"disturbed-{len(kinds)}"
        # Making Prefect's tables takes longer than all the rest of a start.
        shutil.copytree(calm.store / ".state" / "prefect", store / ".state" / "prefect")
        rows = list(story(scene, calm.arguments, store, kinds[: scene.kills], rng))
        yield from rows
        kinds = kinds[len(rows) :]
        yield ending(scene, store, calm.wanted)
        shutil.rmtree(store)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.pipelines.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scene", choices=SCENES)
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    scene, folder, rows = SCENES[arguments.scene], arguments.folder.resolve(), []
    began = time.monotonic()
    with undisturbed(folder, scene.recipe) as calm:
        for row in trial(scene, calm, folder, arguments.kills, arguments.seed):
            print(json.dumps(row), flush=True)
            rows.append(row)
    kinds = Counter(row["kind"] for row in rows if "kind" in row)
    stories = [row for row in rows if "nodes" in row]
    wrong = sum(any(row[key] for key in ("nodes_that_differ", "runs_left", "jobs_left", "processes_left")) for row in stories)
    facts = {
        "command": f"python -m tests.pipelines.chaos {arguments.scene} FOLDER --kills {arguments.kills} --seed {arguments.seed}",
        "cores": os.cpu_count(),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "kills": dict(kinds),
        "stories": len(stories),
        "stories_with_something_wrong": wrong,
    }
    print(json.dumps(facts))
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
