"""The encode stage against the bare encoders of diffusers and open_clip on tensors that are ready: one thread of networks each.

The stage reads tars, decodes, resizes, tokenises and writes Parquet beside its networks, on the other cores: one worker in
one process, as a GPU has it. `ratio` is its rate over that of the networks alone. `standin_ratio` is what it reaches of the 125
images a second of networks that wait 8 ms an image in place of computing, and `images_per_core_s` how many images a second one
core makes ready for them. Its moments are compared with the bare encoder's. With `--before REV` the stage of that commit takes
turns with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image, ImageOps

from benchmarks.before import ROOT, commit_of, worktree
from benchmarks.encode_side import BATCH, STANDIN_SECONDS
from benchmarks.frame import Result, machine, progress
from examples.little_web.folder import write_folder
from unidiffuser.references import EMBEDDED

FEW = 128


class Bare:
    """The networks by their libraries' own hands, and tensors that are ready for them."""

    def __init__(self, tars: list[str], size: int) -> None:
        import open_clip
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL.from_pretrained(EMBEDDED / "vae").eval()
        clip = f"local-dir:{EMBEDDED / 'clip'}"
        self.clip, preprocess = open_clip.create_model_from_pretrained(clip)
        self.keys, pictures, captions = zip(*rows_of(tars), strict=True)
        squares = [ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS) for picture in pictures]
        self.pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2)
        self.seen = torch.stack([preprocess(square) for square in squares])
        self.ids = open_clip.get_tokenizer(clip)(list(captions))

    @torch.inference_mode()
    def run(self) -> dict[str, np.ndarray]:
        """The moments, (2C, h, w), by key."""
        found: list[np.ndarray] = []
        for at in range(0, len(self.keys), BATCH):
            part = slice(at, at + BATCH)
            found += list(self.vae.encode(self.pixels[part].float() / 127.5 - 1).latent_dist.parameters.half().numpy())
            self.clip.encode_image(self.seen[part])
            self.clip.encode_text(self.ids[part])
        return dict(zip(self.keys, found, strict=True))


def rows_of(tars: list[str]) -> Iterator[tuple[str, Image.Image, str]]:
    """Key, picture and caption of every sample of some tars."""
    import webdataset

    for sample in webdataset.WebDataset(tars, shardshuffle=False).decode("pilrgb"):
        picture = next(sample[name] for name in ("jpg", "png", "webp") if name in sample)
        yield sample["__key__"], picture, sample["txt"]


def difference(latents: list[str], moments: dict[str, np.ndarray]) -> float:
    """The largest difference between what the stage wrote and the bare encoder's moments."""
    worst = 0.0
    for address in latents:
        table = pq.read_table(address, columns=["key", "moments"])
        for key, cell in zip(table["key"].to_pylist(), table["moments"].to_pylist(), strict=True):
            theirs = moments[key].astype(np.float32)
            worst = max(worst, float(np.abs(np.frombuffer(cell, np.float16).astype(np.float32) - theirs.ravel()).max()))
    return worst


def side(root: Path, folder: Path, size: int, file: Path) -> dict[str, Any]:
    """What `encode_side` measured with the stage of a commit."""
    script = str(ROOT / "benchmarks" / "encode_side.py")
    subprocess.run([sys.executable, "-P", script, str(root), str(folder), str(size), str(file)], check=True, stdout=sys.stderr)
    return json.loads(file.read_text())


def typical(runs: list[dict[str, Any]], bare_rate: float) -> dict[str, float]:
    """The figures of one commit's stage: medians over its runs."""
    rates = {kind: median(run[kind]["rows"] / run[kind]["seconds"] for run in runs) for kind in ("stage", "standin")}
    return {
        "ratio": round(rates["stage"] / bare_rate, 3),
        "standin_ratio": round(rates["standin"] * STANDIN_SECONDS, 3),
        "images_per_core_s": round(median(run["standin"]["rows"] / run["standin"]["cpu"] for run in runs), 1),
        "rows_per_s": round(rates["stage"], 1),
    }


def main(
    pictures: Annotated[int, typer.Option(help="Pictures to encode.", min=FEW)] = 512,
    size: Annotated[int, typer.Option(help="Pixels a side.", min=32)] = 256,
    rounds: Annotated[int, typer.Option(help="Runs of each side; the median counts.", min=1)] = 3,
    before: Annotated[str, typer.Option(help="Measure the stage of this commit too.", metavar="REV")] = "",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Compare the encode stage with the bare encoders on tensors that are ready."""
    torch.set_num_threads(1)
    words = machine(torch.device("cpu"))
    bare: Bare | None = None
    seconds, worst = list[float](), 0.0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unidiffuser-encode-")))
        write_folder(folder / "many", pictures)
        roots = {"ours": ROOT} | ({"before": stack.enter_context(worktree(before))} if before else {})
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in roots}
        for number in range(rounds):
            for name in list(roots) if number % 2 == 0 else list(roots)[::-1]:
                runs[name].append(side(roots[name], folder, size, folder / f"{name}-{number}.json"))
            bare = bare or Bare(runs["ours"][0]["tars"], size)
            start = time.perf_counter()
            moments = bare.run()
            seconds.append(time.perf_counter() - start)
            worst = max(worst, difference(runs["ours"][-1]["latents"], moments))
            took = {name: {kind: found[-1][kind] for kind in ("stage", "standin")} for name, found in runs.items()}
            progress(f"round {number + 1} of {rounds}: the bare encoders {seconds[-1]:.1f} s for {len(moments)} rows, {took}")
    rate = len(moments) / median(seconds)
    figures = typical(runs["ours"], rate)
    ratio = figures.pop("ratio")
    figures |= {"peer_rows_per_s": round(rate, 1), "largest_difference": worst}
    if before:
        figures |= {f"before_{name}": value for name, value in typical(runs["before"], rate).items()}
    commits = {"commit": commit_of()} | ({"before": commit_of(before)} if before else {})
    kept = {name: [{kind: run[kind] for kind in ("stage", "standin")} for run in found] for name, found in runs.items()}
    details: dict[str, Any] = {**commits, "size": size, "rows": len(moments), "bare_seconds": seconds, "runs": kept}
    Result("encode", ratio, "bare_encoders", figures, words, details).finish(file)


if __name__ == "__main__":
    typer.run(main)
