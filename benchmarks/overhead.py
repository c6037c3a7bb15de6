"""What orchestration costs: the time that `unidiffuser demo` takes from nothing, less the work of its nodes; and again, reused.

A node's work is what its manifest counts. The rest of its Ray job is its process: submission, Python, imports. What then
remains of the command is the start of the servers, Prefect, the pages, and the command itself.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.frame import Result, machine, progress
from infra.dataset import all_datasets
from infra.store import Store

_ENDED = re.compile(r"^(\S+) (made|reused) [\d,]+ rows(?: \(([\d.]+) s\))?$", re.M)


@dataclass(frozen=True)
class Node:
    """Seconds of a node that was made: of its work, and of its job's process around it."""

    name: str
    work: float
    process: float


def ended(printed: str, result: str) -> dict[str, float]:
    """Seconds by node, as the command printed them, of the nodes that were ``made`` or ``reused``."""
    return {name: float(seconds or 0) for name, how, seconds in _ENDED.findall(printed) if how == result}


def nodes_of(printed: str, store: Store) -> list[Node]:
    """The nodes that a command made, from what it printed and from the manifests of a store that was empty before."""
    work = {dataset.manifest.node: dataset.manifest.seconds for dataset in all_datasets(store)}
    return [Node(name, work[name], job - work[name]) for name, job in ended(printed, "made").items()]


def timed_command(*arguments: str) -> tuple[float, str]:
    """Wall seconds and output of a `unidiffuser` command; its output is also shown.

    Raises:
        typer.Exit: it failed.
    """
    start, lines = time.perf_counter(), []
    command = [sys.executable, "-m", "pipelines.command", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            progress(line.rstrip())
    if process.returncode:
        raise typer.Exit(process.returncode)
    return time.perf_counter() - start, "".join(lines)


def main(
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Run the demo in an empty store, then again, and say where the seconds went."""
    words = machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "runs"))
        wall, printed = timed_command("demo", "--store", store)
        nodes = nodes_of(printed, Store(store))
        again, reprinted = timed_command("demo", "--store", store)
    reused = ended(reprinted, "reused")
    if set(reused) != {node.name for node in nodes}:
        raise SystemExit(f"not everything was reused: {sorted(reused)}")
    work, processes = sum(node.work for node in nodes), sum(node.process for node in nodes)
    rest = wall - work - processes
    figures = {
        "wall_s": round(wall, 1),
        "work_s": round(work, 1),
        "processes_s": round(processes, 1),
        "rest_s": round(rest, 1),
        "rest_share": round(rest / wall, 3),
        "again_s": round(again, 1),
        "slowest_reused_node_s": max(reused.values()),
    }
    details = {"nodes": [{name: _rounded(value) for name, value in asdict(node).items()} for node in nodes], "reused": reused}
    Result("overhead", round((work + processes) / wall, 3), "nodes", figures, words, details).finish(file)


def _rounded(value: str | float) -> str | float:
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
