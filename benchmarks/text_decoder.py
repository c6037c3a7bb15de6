"""The text decoder against the paper's: BLEU-4 of captions of unseen scenes, reconstructed from their latents.

Runs the stage `text-codec` of configs/text-decoder.yaml, with the command that anyone would use, on the captions of the little
web. What is scored are captions of the little web's held-out scenes: no link and no embedded encoder has seen these scenes, and
when to stop was decided by other captions. The paper's figure (arXiv 2303.06555) is of its own captions and decoder: the ratio
says that the decoder reaches that quality here, not that one is better.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pyarrow.parquet as pq
import torch
import typer

from benchmarks.frame import Result, machine, progress
from examples.little_web.build import build
from infra.dataset import Dataset, find
from infra.store import Store
from stages.encode.text_codec import bleu4
from stages.runner.graph import plan
from stages.runner.recipe import load_recipe
from unidiffuser.encoders import ClipEncoder
from unidiffuser.text_decoder import TextCodec

PAPER = 0.894
RECIPE = Path(__file__).parent.parent / "configs" / "text-decoder.yaml"


def little_web(store: str) -> Path:
    """The folder of the little web whose captions are learned; built unless it is there."""
    web = Path(store, "little-web").resolve()
    if not (web / "held_out.parquet").is_file():
        progress(f"building a little web in {web}")
        build(web, rows=1000, seed=0)
    return web


def train(store: str, web: Path) -> Dataset:
    """The codec trained on the captions of a little web's links, as a dataset of the store; made unless it is there.

    Raises:
        typer.Exit: the run failed, and has said why.
    """
    metadata = f"subsets.captions.select.metadata=['{web}/metadata/part-*.parquet']"
    run = [sys.executable, "-m", "pipelines.command", "run", str(RECIPE), "--store", store, "--set", metadata]
    if (code := subprocess.run(run, stdout=sys.stderr).returncode) != 0:
        raise typer.Exit(code)
    place = Store(store)
    planned = plan(load_recipe(RECIPE, [metadata]), place)["text-codec"]
    dataset = find(place, planned.stage, planned.fingerprint)
    assert dataset is not None
    return dataset


def config_of(node: str) -> dict[str, Any]:
    """The recipe's configuration of a node; a manifest has the digests of encoders, not their names."""
    return load_recipe(RECIPE).nodes[node].config.model_dump()


def unseen(web: Path) -> list[str]:
    """Captions of the held-out scenes, as long as those that are learned."""
    shortest = config_of("captions-select")["min_caption_words"]
    captions = pq.read_table(web / "held_out.parquet", columns=["caption"])["caption"].to_pylist()
    return [caption for caption in captions if len(caption.split()) >= shortest]


def score(dataset: Dataset, captions: list[str]) -> float:
    """BLEU-4 (0 to 1) of captions that go through the codec of a dataset and back, with the beams of its own validation."""
    config = config_of("text-codec")
    with TemporaryDirectory() as scratch:
        codec = TextCodec.load(dataset.fetch(Path(scratch, "codec")))
    return bleu4(ClipEncoder.load(config["text"]), codec, captions, config["batch"], config["beams"])


def main(
    store: Annotated[str, typer.Option("--store", help="Folder of the datasets.")] = "runs",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Train the embedded text decoder on the little web's captions, and compare its BLEU-4 with the paper's."""
    words = machine(torch.device("cpu"))
    web = little_web(store)
    dataset, captions = train(store, web), unseen(web)
    manifest, bleu = dataset.manifest, score(dataset, captions)
    found = manifest.summary
    Result(
        name="text_decoder",
        ratio=bleu / PAPER,
        peer="paper",
        figures={"bleu4": round(bleu, 4), "paper_bleu4": PAPER, "captions": len(captions), "beams": found["beams"]},
        machine=words,
        details={
            "validation": {"bleu4": found["bleu4"], "captions": found["held_out"], "history": found["history"]},
            "captions": asdict(manifest.stats),
            "config": manifest.config,
            "seconds": manifest.seconds,
        },
    ).finish(file)
    if bleu < PAPER:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
