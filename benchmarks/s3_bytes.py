"""Bytes that leave an S3 server for each byte that is of use, where many workers each read a part of many files.

    select    duplicates: every pair of keys is of use once
    compare   filter's near duplicates: every row that a unit asks for is of use once to this unit
    index     the start of a training: the columns that tell of the shards, once

and `plan_requests`, what a plan asks of a store of 230,000 units that are all done. The server is one in this process. With more
files and more ranges a part is smaller: --files and --ranges show what that costs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.before import commit_of, worktree
from benchmarks.frame import Result, machine, progress

SIDE = Path(__file__).with_name("s3_bytes_side.py")


def measured(folder: Path, arguments: list[str]) -> dict[str, float]:
    """What the code in a folder asks of the server, by this commit's measure."""
    (folder / "benchmarks" / SIDE.name).write_bytes(SIDE.read_bytes())
    (folder / "benchmarks" / "counted.py").write_bytes(SIDE.with_name("counted.py").read_bytes())
    command = [sys.executable, "-m", f"benchmarks.{SIDE.stem}", *arguments]
    printed = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


def main(
    files: Annotated[int, typer.Option(min=1, help="Files of keys or looks.")] = 4,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each.")] = 1_000_000,
    ranges: Annotated[int, typer.Option(min=1, help="Ranges that the rows are read by.")] = 8,
    units: Annotated[int, typer.Option(min=1, help="Units of the plan.")] = 23_000,
    before: Annotated[str, typer.Option(help="Measure this commit as well.", metavar="REV")] = "",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Count bytes and requests against an S3 server."""
    words = machine(torch.device("cpu"))
    arguments = [f"--{name}={value}" for name, value in {"files": files, "rows": rows, "ranges": ranges, "units": units}.items()]
    found = measured(SIDE.parents[1], arguments)
    progress(str(found))
    details: dict[str, Any] = {"sizes": dict(argument[2:].split("=") for argument in arguments), "commit": commit_of()}
    if before:
        with worktree(before) as place:
            details["before"] = {"commit": commit_of(before), **measured(place, arguments)}
            progress(str(details["before"]))
    worst = max(found[name] for name in ("select", "compare", "index"))
    Result("s3_bytes", round(1 / worst, 3), "useful_bytes", found, words, details).finish(file)


if __name__ == "__main__":
    typer.run(main)
