"""The encode stage against a bare loop of diffusers and open_clip: the same pictures, captions and embedded weights.

The stage runs on a Ray of its own, on as many workers as it takes here. What does not depend on the rows is measured by the same
stage on a few pictures, and taken off. The loop is one process with all threads, reads the same tars, and writes nothing; its
moments are compared with those that the stage wrote.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image, ImageOps

from benchmarks.before import commit_of
from benchmarks.frame import Result, choose_device, machine, progress
from examples.little_web.folder import write_folder
from infra.dataset import Dataset
from infra.store import Store
from unidiffuser.references import EMBEDDED

FEW = 16
BATCH = 16
RECIPE = """
name: encode-clock
subsets:
  few:
    folder: {{images: ['few/**/*'], shard_rows: {shard}}}
    filter: {{clip_scores: false, duplicate_tolerance: null}}
    encode: {{size: {size}}}
  many:
    folder: {{images: ['many/**/*'], shard_rows: {shard}}}
    filter: {{clip_scores: false, duplicate_tolerance: null}}
    encode: {{size: {size}}}
text-codec: {{captions: few, latent_width: 32, steps: 1, batch: 8, validation_captions: 2}}
"""


def ours(folder: Path, number: int) -> tuple[float, Dataset]:
    """Seconds that the stage takes for the many pictures beyond those for the few, and what it made."""
    from stages.__main__ import run_node
    from stages.runner.recipe import load_recipe

    recipe, store = load_recipe(folder / "recipe.yaml", []), Store(str(folder / f"store-{number}"))
    seconds = {}
    for subset in ("few", "many"):
        for node in (f"{subset}-folder", f"{subset}-filter", "text-codec"):
            run_node(recipe, node, store)
        start = time.perf_counter()
        dataset = run_node(recipe, f"{subset}-encode", store)
        seconds[subset] = time.perf_counter() - start
    return seconds["many"] - seconds["few"], dataset


class Bare:
    """The models by their libraries' own hands."""

    def __init__(self, device: torch.device) -> None:
        import open_clip
        from diffusers import AutoencoderKL

        self.device = device
        self.vae = AutoencoderKL.from_pretrained(EMBEDDED / "vae").to(device).eval()
        clip = f"local-dir:{EMBEDDED / 'clip'}"
        self.clip, self.preprocess = open_clip.create_model_from_pretrained(clip, device=device)
        self.tokenizer = open_clip.get_tokenizer(clip)

    @torch.inference_mode()
    def run(self, rows: Iterator[tuple[str, Image.Image, str]], size: int) -> dict[str, np.ndarray]:
        """The moments, (2C, h, w), by key."""
        found: dict[str, np.ndarray] = {}
        batch: list[tuple[str, Image.Image, str]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH:
                found |= self.encode(batch, size)
                batch = []
        return found | (self.encode(batch, size) if batch else {})

    def encode(self, batch: list[tuple[str, Image.Image, str]], size: int) -> dict[str, np.ndarray]:
        squares = [ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS) for _, picture, _ in batch]
        pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2)
        moments = self.vae.encode(pixels.to(self.device).float() / 127.5 - 1).latent_dist.parameters
        self.clip.encode_image(torch.stack([self.preprocess(square) for square in squares]).to(self.device))
        self.clip.encode_text(self.tokenizer([caption for _, _, caption in batch]).to(self.device))
        return {key: row for (key, _, _), row in zip(batch, moments.half().cpu().numpy(), strict=True)}


def rows_of(tars: list[str]) -> Iterator[tuple[str, Image.Image, str]]:
    """Key, picture and caption of every sample of some tars."""
    import webdataset

    for sample in webdataset.WebDataset(tars, shardshuffle=False).decode("pilrgb"):
        picture = next(sample[name] for name in ("jpg", "png", "webp") if name in sample)
        yield sample["__key__"], picture, sample["txt"]


def tars_of(encoded: Dataset) -> list[str]:
    """The tars that a dataset of latents was made from."""
    from infra.dataset import find

    reference = encoded.manifest.inputs["rows"]
    rows = find(encoded.store, reference.stage, reference.fingerprint)
    assert rows is not None
    return [rows.url(entry) for entry in rows.files if entry.name.endswith(".tar")]


def difference(encoded: Dataset, moments: dict[str, np.ndarray]) -> float:
    """The largest difference between what the stage wrote and the loop's moments."""
    worst = 0.0
    for entry in encoded.files:
        table = pq.read_table(encoded.url(entry), columns=["key", "moments"])
        for key, cell in zip(table["key"].to_pylist(), table["moments"].to_pylist(), strict=True):
            theirs = moments[key].astype(np.float32)
            worst = max(worst, float(np.abs(np.frombuffer(cell, np.float16).astype(np.float32) - theirs.ravel()).max()))
    return worst


def main(
    pictures: Annotated[int, typer.Option(help="Pictures to encode.", min=FEW)] = 768,
    size: Annotated[int, typer.Option(help="Pixels a side.", min=32)] = 256,
    rounds: Annotated[int, typer.Option(help="Runs of each side; the median counts.", min=1)] = 3,
    device: Annotated[str, typer.Option(help="auto is CUDA where it is found.")] = "auto",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Compare the encode stage with a bare loop over the same models."""
    place, commit = choose_device(device), commit_of()
    words, seconds, worst = machine(place), {"ours": list[float](), "bare": list[float]()}, 0.0
    with tempfile.TemporaryDirectory(prefix="unidiffuser-encode-") as scratch:
        folder = Path(scratch)
        write_folder(folder / "few", FEW)
        write_folder(folder / "many", pictures)
        (folder / "recipe.yaml").write_text(RECIPE.format(size=size, shard=64), encoding="utf-8")
        bare = Bare(place)
        for number in range(rounds):
            took, encoded = ours(folder, number)
            seconds["ours"].append(took)
            rows = encoded.manifest.stats.rows_out
            start = time.perf_counter()
            moments = bare.run(rows_of(tars_of(encoded)), size)
            seconds["bare"].append(time.perf_counter() - start)
            worst = max(worst, difference(encoded, moments))
            progress(f"round {number + 1} of {rounds}: {took:.1f} s, the loop {seconds['bare'][-1]:.1f} s for {rows} rows")
    ours_s, bare_s = (median(found) for found in seconds.values())
    if ours_s <= 0:
        raise SystemExit("the few pictures took as long as the many: give more --pictures, on a quiet machine")
    rate = (rows - FEW) / ours_s
    figures = {"rows_per_s": round(rate, 1), "peer_rows_per_s": round(rows / bare_s, 1), "largest_difference": worst}
    details: dict[str, Any] = {"commit": commit, "size": size, "rows": rows, "seconds": seconds}
    Result("encode", round(rate / (rows / bare_s), 3), "bare_loop", figures, words, details).finish(file)


if __name__ == "__main__":
    typer.run(main)
