"""Ctrl-C in every node of an end-to-end run, and on from there: `python -m tests.pipelines.interruptions FOLDER --json FILE`.

The recipe runs once undisturbed. Then, in another store, once more with one interruption in every node, at a random moment
after the node began to work. Each time the command must end by itself with exit code 130 and leave neither a process nor an
open port; at the end every dataset must hold the same files, by sha256, as the undisturbed run. A training's history is
compared without its times, which are never the same twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.little_web.build import build
from examples.little_web.server import LittleWeb
from infra.dataset import Dataset, FileEntry, find
from infra.processes import recorded
from infra.store import Store
from stages.runner.graph import plan
from stages.runner.recipe import load_recipe
from tests.pipelines.conftest import start, survivors
from tests.training.synthetic import TIMINGS

ROWS = 110


def content(dataset: Dataset, entry: FileEntry) -> str:
    """sha256 of a file; of a training's history, without its times."""
    if entry.name != "history.jsonl":
        return entry.sha256
    with dataset.open(entry) as file:
        rows = [json.loads(line) for line in file.read().decode().splitlines()]
    kept = [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def digests(recipe: Path, store: Store, hosts: str) -> dict[str, dict[str, str]]:
    """Node -> unit and name -> content of every file of its dataset."""
    found = {}
    for node, planned in plan(load_recipe(recipe, [hosts]), store).items():
        dataset = find(store, planned.stage, planned.fingerprint)
        assert dataset is not None, f"{node} is not committed"
        found[node] = {f"{entry.unit}/{entry.name}": content(dataset, entry) for entry in dataset.files}
    return found


def listening(address: str) -> bool:
    host, port = address.removeprefix("http://").rsplit(":", 1)
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0


def interrupt(node: str, arguments: list[str | Path], store: Path, wait: float) -> dict[str, Any]:
    """Run until `node`, send SIGINT to the foreground processes `wait` seconds after it began, and look at what is left."""
    command = start("run", *arguments, "--until", node)
    said = command.read_until(f"{node} ").strip()
    time.sleep(wait)
    servers = [server for name in ("ray", "prefect") if (server := recorded(name, store / ".state")) is not None]
    began = time.monotonic()
    code, _ = command.finish(signal.SIGINT)
    return {
        "node": node,
        "said": said,
        "seconds_in": round(wait, 1),
        "exit_code": code,
        "seconds_to_end": round(time.monotonic() - began, 1),
        "processes_left": len(survivors(store)),
        "ports_left": sum(listening(server.address) for server in servers),
    }


def trial(folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    """One row a node, then the comparison with the undisturbed run."""
    build(folder / "web", rows=ROWS, seed=0)
    recipe = Path(shutil.copy(Path(__file__).parent / "recipe.yaml", folder))
    rng = random.Random(seed)
    with LittleWeb(folder / "web") as web:
        hosts = f"subsets.little.download.hosts={{little-web.example: '{web.address}'}}"
        calm, disturbed = folder / "calm", folder / "disturbed"
        code, printed = start("run", recipe, "--set", hosts, "--store", calm).finish()
        assert code == 0, printed
        arguments: list[str | Path] = [recipe, "--set", hosts, "--store", disturbed]
        for node in load_recipe(recipe, [hosts]).nodes:
            yield interrupt(node, arguments, disturbed, rng.uniform(0, 4))
        code, printed = start("run", *arguments).finish()
        assert code == 0, printed
        before, after = (digests(recipe, Store(str(store)), hosts) for store in (calm, disturbed))
        yield {"nodes": len(before), "nodes_that_differ": sorted(node for node in before if before[node] != after[node])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pipelines.interruptions", description=__doc__)
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    rows = []
    for row in trial(arguments.folder.resolve(), arguments.seed):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if arguments.json:
        facts = {"command": "python -m tests.pipelines.interruptions", "seed": arguments.seed, "cores": os.cpu_count()}
        arguments.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
