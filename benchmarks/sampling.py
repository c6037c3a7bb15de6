"""Sampling against diffusers' UniDiffuserPipeline: the same random weights, threads, steps, guidance and precision.

Ten pictures of one prompt, and ten captions of one picture, encoding and decoding included. All four sides take turns: this
project and diffusers, each with and without torch.compile of the noise prediction network. The ratio is the worse of the two
tasks without compilation. Memory is measured in a process for each side. The matrix products of the network's calls run alone
in every round too, by ``torch.matmul``: what diffusers' network takes, over what they take, is the most that a network of these
sizes can gain with torch's own products; ``unidiffuser.linear`` has faster ones for some processors.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from PIL import Image

from benchmarks.efficiency import page
from benchmarks.frame import Result, choose_device, interleaved, machine, peak_in_child, progress, synchronise, timed
from benchmarks.matmuls import Product, recorded, replay
from benchmarks.pair import Sizes, build, differences, load_ours, load_peer

TASKS = ("t2i", "i2t")
SIDES = ("ours", "diffusers")
PROMPT = "a large red apple on a blue background"
TOLERANCE = 1e-3


class Work:
    """One side's sampling, as its users call it.

    Args:
        guidance: as the paper counts it, from 0; diffusers' pipeline counts from 1.
    """

    def __init__(self, folder: Path, side: str, count: int, steps: int, guidance: float, device: torch.device) -> None:
        self.side, self.count, self.steps, self.guidance = side, count, steps, guidance
        load: Callable[..., Any] = load_ours if side == "ours" else load_peer
        self.model = load(folder, device)
        self.network = self.model.uvit if side == "ours" else self.model.unet
        pixels = self.model.size if side == "ours" else self.model.unet.config.sample_size * self.model.vae_scale_factor
        ramp = Image.linear_gradient("L").resize((pixels, pixels))
        self.picture = Image.merge("RGB", [ramp, ramp.rotate(90), ramp.rotate(180)])

    def run(self, task: str, steps: int | None = None) -> list:
        """Pictures or captions."""
        if self.side == "ours":
            given: dict[str, Any] = {"prompts": [PROMPT]} if task == "t2i" else {"images": [self.picture]}
            # The solver that the peer's pipeline has.
            drawn = self.model.generate(
                task, count=self.count, batch=self.count, steps=steps or self.steps, guidance=self.guidance, sampler="dpm++2m",
                mark=False, **given,
            )  # fmt: skip
            return [result.image if task == "t2i" else result.caption for result in drawn]
        settings = {"num_inference_steps": steps or self.steps, "guidance_scale": self.guidance + 1}
        if task == "t2i":
            self.model.set_text_to_image_mode()
            return self.model(prompt=PROMPT, num_images_per_prompt=self.count, **settings).images
        self.model.set_image_to_text_mode()
        return self.model(image=self.picture, num_prompts_per_image=self.count, **settings).text

    def compile(self) -> None:
        """Compile the network as the side's users do: by this project's method, and as diffusers' documentation says."""
        if self.side == "ours":
            self.model.compile()
        else:
            self.network.compile()

    def products(self, task: str) -> list[Product]:
        """The matrix products of one call of the network in this task."""
        forward, found = self.network.forward, []

        def watched(*args: Any, **kwargs: Any) -> Any:
            with recorded() as recorder:
                result = forward(*args, **kwargs)
            found.extend(recorder.found)
            return result

        with patch.object(self.network, "forward", watched):
            self.eagerly(task, 1)
        return found

    def eagerly(self, task: str, steps: int | None = None) -> list:
        """The same, with the network not compiled even if it can be."""
        with torch.compiler.set_stance("force_eager"):
            return self.run(task, steps)


class Stopwatch:
    """Seconds and calls by phase, while ``running``."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the network, the autoencoder, the encoders, the caption decoder, and all together."""
        start = time.perf_counter()
        with ExitStack() as stack:
            for phase, owner, method in self._phases():
                stack.enter_context(patch.object(owner, method, self._watched(phase, getattr(owner, method))))
            yield
        synchronise(self.device)
        self.seconds["all"] += time.perf_counter() - start

    def _phases(self) -> list[tuple[str, Any, str]]:
        model = self.work.model
        parts = [("autoencoder", model.vae, "decode")]
        if self.work.side == "ours":
            parts += [("autoencoder", model.vae, "moments"), ("captions", model.text_codec, "decode")]
            parts += [("encoders", model.clip_text, "tokens"), ("encoders", model.clip_image, "image")]
        else:
            parts += [("autoencoder", model.vae, "encode"), ("captions", model, "decode_text_latents")]
            parts += [("encoders", model.text_encoder, "forward"), ("encoders", model.image_encoder, "forward")]
        return [("network", self.work.network, "forward"), *parts]

    def _watched(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            synchronise(self.device)
            start = time.perf_counter()
            result = method(*args, **kwargs)
            synchronise(self.device)
            self.seconds[phase] += time.perf_counter() - start
            self.calls[phase] += 1
            return result

        return watched


def work_of(
    folder: Path, side: str, task: str, count: int, steps: int, guidance: float, compiled: bool, device: torch.device
) -> Callable[[], list]:
    """A side's sampling that has run before, for the measurement of memory."""
    work = Work(folder, side, count, steps, guidance, device)
    if compiled:
        work.compile()
    work.run(task, steps=1)
    return lambda: work.run(task)


def compare(task: str, sides: dict[str, Work], rounds: int, compiling: bool, device: torch.device) -> dict[str, Any]:
    """One task: seconds of every side in every round, medians and ratios, and without compilation mean phases and calls."""
    watches = {name: Stopwatch(work, device) for name, work in sides.items()}
    runs: dict[str, Callable[[], object]] = {name: partial(_watched, sides[name], task, watches[name]) for name in sides}
    found: dict[str, Any] = {"compile_s": {}}
    # Every task pays for its compilation: nothing is left of an earlier task, or of an earlier run on the disk.
    torch.compiler.reset()
    for name, work in sides.items():
        eager = timed(partial(work.eagerly, task, 1), device)
        if compiling:
            found["compile_s"][name] = timed(partial(work.run, task, 1), device) - eager
            runs[f"{name} compiled"] = partial(work.run, task)
    plain = replay(sides["ours"].products(task), next(sides["ours"].network.parameters()).dtype, device)
    plain()
    runs["products"] = plain
    seconds = interleaved(runs, rounds, device)
    typical = {name: median(values) for name, values in seconds.items()}
    found |= {"seconds": seconds, "median": typical, "ratio": typical["diffusers"] / typical["ours"]}
    if compiling:
        found["compiled_ratio"] = typical["diffusers"] / typical["ours compiled"]
        found["both_compiled_ratio"] = typical["diffusers compiled"] / typical["ours compiled"]
    found["phases"] = {name: {phase: spent / rounds for phase, spent in watch.seconds.items()} for name, watch in watches.items()}
    found["calls"] = {name: watch.calls["network"] // rounds for name, watch in watches.items()}
    found["limit"] = found["phases"]["diffusers"]["network"] / (found["calls"]["ours"] * typical["products"])
    return found


def _watched(work: Work, task: str, watch: Stopwatch) -> None:
    with watch.running():
        work.eagerly(task)


def main(
    width: Annotated[int, typer.Option(min=64, help="Width of the U-ViT, a multiple of 64.")] = Sizes.width,
    depth: Annotated[int, typer.Option(min=2, help="In and out blocks of the U-ViT, even.")] = Sizes.depth,
    pixels: Annotated[int, typer.Option(min=16, help="Side of the pictures, a multiple of 16.")] = Sizes.pixels,
    autoencoder: Annotated[int, typer.Option(min=32, help="Channels of the autoencoder.")] = Sizes.autoencoder,
    decoder: Annotated[int, typer.Option(min=64, help="Width of the caption decoder, a multiple of 64.")] = Sizes.decoder,
    count: Annotated[int, typer.Option(min=1, help="Pictures, and captions.")] = 10,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0.1, help="Guidance scale, as the paper counts it.")] = 7.0,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds, in which every side runs once.")] = 3,
    task: Annotated[list[str] | None, typer.Option(help="t2i or i2t (repeatable); both if not given.")] = None,
    compiling: Annotated[bool, typer.Option("--compile/--no-compile", help="Also compiled.")] = True,
    memory: Annotated[bool, typer.Option(help="Also measure memory.")] = True,
    threads: Annotated[int, typer.Option(help="Threads on a CPU; 0 leaves torch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="auto is CUDA where it is found.")] = "auto",
    file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here, and its table beside it as .md.", metavar="FILE")
    ] = None,
) -> None:
    """Compare sampling with diffusers' UniDiffuserPipeline."""
    tasks = tuple(task or TASKS)
    if unknown := set(tasks) - set(TASKS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(TASKS)}", param_hint="--task")
    if threads:
        torch.set_num_threads(threads)
    place, sizes = choose_device(device), Sizes(width, depth, pixels, autoencoder=autoencoder, decoder=decoder)
    words = machine(place)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(folder, sizes)
        sides = {side: Work(folder, side, count, steps, guidance, place) for side in SIDES}
        apart = differences(sides["ours"].model, sides["diffusers"].model)
        progress(f"same weights, greatest relative differences: {apart}")
        if max(apart.values()) > TOLERANCE:
            raise SystemExit(f"the two sides do not compute the same: {apart}")
        if compiling:
            torch.compiler.config.force_disable_caches = True
            for work in sides.values():
                work.compile()
        found = {name: compare(name, sides, rounds, compiling, place) for name in tasks}
        del sides
        if memory:
            for name in tasks:
                found[name]["memory_mib"] = {
                    f"{side} compiled" if compiled else side: peak_in_child(
                        work_of, folder, side, name, count, steps, guidance, compiled, place
                    )
                    for compiled in ((False, True) if compiling else (False,))
                    for side in SIDES
                }
    details = {"sizes": asdict(sizes), "count": count, "steps": steps, "guidance": guidance, "differences": apart, "tasks": found}
    ratio = min(result["ratio"] for result in found.values())
    Result("sampling", ratio, "diffusers", _figures(found), words, details).finish(file)
    if file is not None:
        file.with_suffix(".md").write_text(page(json.loads(file.read_text())))


def _figures(found: dict[str, dict[str, Any]]) -> dict[str, float | int | str]:
    """The last line's numbers of every task; memory is this project's peak as a part of diffusers'."""
    figures: dict[str, float | int | str] = {}
    for task, result in found.items():
        for name in ("ratio", "compiled_ratio", "both_compiled_ratio"):
            if name in result:
                figures[f"{task}_{name}"] = result[name]
        network = {side: result["phases"][side]["network"] for side in SIDES}
        figures[f"{task}_network_ratio"] = network["diffusers"] / network["ours"]
        figures[f"{task}_network_limit"] = result["limit"]
        figures[f"{task}_calls"] = f"{result['calls']['ours']}/{result['calls']['diffusers']}"
        if "memory_mib" in result:
            memory = result["memory_mib"]
            figures[f"{task}_memory"] = memory["ours"] / memory["diffusers"]
            if "ours compiled" in memory:
                figures[f"{task}_compiled_memory"] = memory["ours compiled"] / memory["diffusers compiled"]
        if result["compile_s"]:
            figures[f"{task}_compile_s"] = result["compile_s"]["ours"]
    return figures


if __name__ == "__main__":
    typer.run(main)
