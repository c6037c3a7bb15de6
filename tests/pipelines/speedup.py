"""What a cluster of more machines gives: seconds of download, filter and encode on one, two and three nodes of one CPU each.

`unshare --net --pid --fork --kill-child --mount-proc python -m tests.pipelines.speedup FOLDER --json FILE`

The nodes share the cores of this machine with all that serves them (S3, the web, Prefect, Ray's head), so it can only tell what
the stages lose by being spread: where nodes wait for a network they gain, where they compute they cannot have more than there is.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.counted import counted_s3
from benchmarks.frame import machine
from examples.little_web.server import LittleWeb
from infra.store import Store
from tests.pipelines.cluster import Play, own_tmp, prepared
from tests.pipelines.losses import files_of
from tests.pipelines.standing import OUTSIDE, standing
from tests.stages.machines import ALONE, network

LINKS = 960
SIMULATION = Path(__file__).parents[2] / "docs" / "results" / "simulation.json"
NODES = (1, 2, 3)
STAGES = {"download": "little-download", "filter": "little-filter", "encode": "little-encode"}


def on_nodes(play: Play, folder: Path, count: int) -> dict[str, Any]:
    """Seconds of each stage on so many nodes, from the start of its job to its commit, and the digests of all its files."""
    store = Store(f"s3://data/runs-{count}")
    with standing(folder) as cluster:
        cluster.lead()
        cluster.join(count)
        if (code := play.run(store.root, STAGES["encode"], cluster.environment)) != 0:
            raise SystemExit(f"error: the command has ended with {code}: {play.last_line()}")
        found = files_of(store)
    return {
        "nodes": count,
        "seconds": {stage: found[node][0].manifest.seconds for stage, node in STAGES.items()},
        "rows": {stage: found[node][0].manifest.stats.rows_out for stage, node in STAGES.items()},
        "files": {stage: found[node][1] for stage, node in STAGES.items()},
    }


def page(result: dict[str, Any]) -> str:
    """The table for people, with the simulated speed-up beside it."""
    simulated = json.loads(SIMULATION.read_text(encoding="utf-8"))["details"]["shards_per_simulated_hour"]
    equal = "equal by sha256" if result["equal"] else "**not equal**"
    lines = [
        "# Download, filter and encode on one, two and three nodes",
        "",
        "Each node is a machine of its own with one CPU to Ray, which shares nothing with the others but an S3 server. All of",
        "them, that server, the web, Prefect and Ray's head run on the two cores of one machine. So where a stage waits for the",
        "network more nodes gain, and where it computes they cannot gain more than what the servers leave of two cores. A stage",
        "takes half a minute here, much of which is the start of its workers; that is not shorter on more nodes.",
        f"The files are {equal} on any number of nodes.",
        "",
        f"| nodes | {' | '.join(f'{stage}, s | speed-up' for stage in STAGES)} | simulated speed-up of a download |",
        "|---" * (2 + 2 * len(STAGES)) + "|",
    ]
    for row in result["table"]:
        measured = " | ".join(f"{row['seconds'][stage]:.1f} | {row['speedup'][stage]:.2f}" for stage in STAGES)
        ideal = simulated[str(row["nodes"])] / simulated["1"]
        lines.append(f"| {row['nodes']} | {measured} | {ideal:.2f} |")
    rows = ", ".join(f"{count:,} rows in {stage}" for stage, count in result["table"][0]["rows"].items())
    lines += [
        "",
        f"{rows}; seconds from the start of a stage's job to its commit. The last column is [simulated](simulation.md), on a",
        "made-up cluster whose machines have a network and processors of their own.",
        "",
        f"Measured by `{result['command']}` on {result['machine']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.pipelines.speedup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--links", type=int, default=LINKS, help="links of the little web")
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder, rows = arguments.folder.resolve(), list[dict[str, Any]]()
    words = machine(torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(network())
        own_tmp(folder)
        stack.enter_context(counted_s3(OUTSIDE))
        web = stack.enter_context(LittleWeb(prepared(folder, arguments.links), host=OUTSIDE))
        for count in NODES:
            own = folder / str(count)
            rows.append(on_nodes(Play(own, web.address), own, count))
            print({name: value for name, value in rows[-1].items() if name != "files"}, flush=True)
    equal = len({json.dumps(row.pop("files"), sort_keys=True) for row in rows}) == 1
    for row in rows:
        row["speedup"] = {stage: round(rows[0]["seconds"][stage] / row["seconds"][stage], 2) for stage in STAGES}
    result = {"command": f"{ALONE} python -m tests.pipelines.speedup FOLDER", "machine": words, "equal": equal, "table": rows}
    print(json.dumps(result, indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        arguments.json.with_suffix(".md").write_text(page(result), encoding="utf-8")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
