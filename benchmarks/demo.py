"""What the demo is worth, in one file: pictures that people named, what the judge finds, and the minutes it took.

    unidiffuser demo --store STORE                                 with a clock beside it
    python -m examples.little_web.naming draw EXPORT FOLDER        then two people write names, who see only these pictures
    python -m benchmarks.demo FOLDER ONE.csv TWO.csv --store STORE --minutes M --json docs/results/demo.json

The ratio is of the lower count of pictures that were named right to the 40 of 50 that are promised.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.frame import Result, machine
from examples.little_web.naming import COUNT, score
from infra.dataset import pointed
from infra.store import Store

PROMISED = 40


def report_of(store: str) -> dict[str, Any]:
    """The report of the demo's evaluation; raises BadParameter where the store has none."""
    dataset = pointed(Store(store), "demo", "evaluate")
    if dataset is None:
        raise typer.BadParameter(f"{store}: holds no evaluation of the recipe demo; run `unidiffuser demo --store {store}`")
    with dataset.open(dataset.file("report.json")) as file:
        report: dict[str, Any] = json.load(file)
    return report


def main(
    folder: Annotated[Path, typer.Argument(help="The folder that naming drew.")],
    names: Annotated[list[Path], typer.Argument(help="What each namer wrote, as CSV.")],
    minutes: Annotated[float, typer.Option("--minutes", help="What the demo took, by the clock.")],
    store: Annotated[str, typer.Option("--store", help="Folder of the demo's datasets.")] = "runs",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Put together what the demo's pictures show, by people and by the judge."""
    report, named = report_of(store), score(folder, names)
    judged = report["details"]["judge"]
    found = {
        "named_of_50": named["named_of_50"],
        "judge": judged["t2i"],
        "judge_before": judged["t2i_before"],
        "judge_on_real": judged["real"]["all_four"],
        "captions": judged["i2t"],
        "minutes": minutes,
    }
    Result(
        name="demo",
        ratio=named["named_of_50"] / PROMISED,
        peer=f"{PROMISED} of {COUNT}",
        figures={
            "named_of_50": named["named_of_50"], "all_four": judged["t2i"]["all_four"],
            "all_four_before": judged["t2i_before"]["all_four"], "judge_on_real": found["judge_on_real"], "minutes": minutes,
        },
        machine=machine(torch.device("cpu")),
        details={"namers": named["namers"], "figures": report["figures"]},
    ).finish(file)  # fmt: skip
    if file is not None:
        # What is promised stands at the top, where everyone looks.
        file.write_text(json.dumps(found | json.loads(file.read_text()), indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
