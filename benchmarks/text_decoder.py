"""The text decoder against the paper's: BLEU-4 of held-out captions, reconstructed from their latents.

Runs the stage `text-codec` of configs/text-decoder.yaml, with the command that anyone would use, on the captions of the little
web. The paper's figure (arXiv 2303.06555) is of its own captions and decoder: the ratio says that the decoder reaches that
quality here, not that one is better.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.frame import Result, machine, progress
from examples.little_web.build import build
from infra.dataset import Dataset, find
from infra.store import Store
from stages.graph import plan
from stages.recipe import load_recipe

PAPER = 0.894
RECIPE = Path(__file__).parent.parent / "configs" / "text-decoder.yaml"


def train(store: str) -> Dataset:
    """The trained codec as a dataset of the store; made unless it is there.

    Raises:
        typer.Exit: the run failed, and has said why.
    """
    web = Path(store, "little-web").resolve()
    if not (web / "held_out.parquet").is_file():
        progress(f"building a little web in {web}")
        build(web, rows=1000, seed=0)
    metadata = f"subsets.captions.select.metadata=['{web}/metadata/part-*.parquet']"
    run = [sys.executable, "-m", "pipelines.command", "run", str(RECIPE), "--store", store, "--set", metadata]
    if (code := subprocess.run(run, stdout=sys.stderr).returncode) != 0:
        raise typer.Exit(code)
    place = Store(store)
    planned = plan(load_recipe(RECIPE, [metadata]), place)["text-codec"]
    dataset = find(place, planned.stage, planned.fingerprint)
    assert dataset is not None
    return dataset


def main(
    store: Annotated[str, typer.Option("--store", help="Folder of the datasets.")] = "runs",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Train the embedded text decoder on the little web's captions, and compare its BLEU-4 with the paper's."""
    words = machine(torch.device("cpu"))
    manifest = train(store).manifest
    found = manifest.summary
    Result(
        name="text_decoder",
        ratio=found["bleu4"] / PAPER,
        peer="paper",
        figures={"bleu4": found["bleu4"], "paper_bleu4": PAPER, "held_out": found["held_out"], "beams": found["beams"]},
        machine=words,
        details={
            "history": found["history"],
            "captions": asdict(manifest.stats),
            "config": manifest.config,
            "seconds": manifest.seconds,
        },
    ).finish(file)
    if found["bleu4"] < PAPER:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
