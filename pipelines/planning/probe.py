"""Measures one process of this machine, while others do the same beside it: how long it takes to begin, and pieces of the work.

Each piece is the stages' own code on a few made pictures, or the trainer's own steps on random latents.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.planning.training import Training
from stages.runner.recipe import Node, Recipe

# Seconds of a measurement, pictures that it goes over, and side of a picture.
SECONDS, PICTURES, SIDE = 0.7, 16, 640
# Samples drawn at once, and the least calls of the network; the most are those of the evaluation.
DRAWN, FEW, MORE = 12, 2, 30
# Matrices whose product tells of arithmetic.
PRODUCT = 768


def rate_of(work: Callable[[], object], seconds: float | None = None) -> float:
    """Seconds of one call: the mean over some (for `SECONDS`, unless told), after a first that does not count."""
    seconds = SECONDS if seconds is None else seconds
    work()
    start, calls = time.perf_counter(), 0
    while calls < 1 or time.perf_counter() - start < seconds:
        work()
        calls += 1
    return (time.perf_counter() - start) / calls


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Probe:
    """What is measured of a recipe, by one process.

    Args:
        meet: waits for the other processes, so that all measure the same at a time.
    """

    def __init__(self, recipe: Recipe, trained: Sequence[Training], rank: int, world: int, meet: Callable[[], object]) -> None:
        self.recipe, self.trained, self.rank, self.world, self.meet = recipe, trained, rank, world, meet
        self.found: dict[str, float] = {}

    def measure(self, folder: Path) -> dict[str, float]:
        """Seconds by name, see `pipelines.planning.calibration.Machine`."""
        start = time.perf_counter()
        import ray  # noqa: F401

        self.found["ray"] = time.perf_counter() - start
        import torch

        torch.set_num_threads(1)
        self.found["torch"] = time.perf_counter() - start
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._product(torch)
        self._store()
        by_stage = {stage: [node for node in self.recipe.nodes.values() if node.stage == stage] for stage in ("filter", "encode")}
        for node in by_stage["filter"][:1]:
            self._filter(node)
        for node in by_stage["encode"]:
            self._encode(node)
        if "text-codec" in self.recipe.nodes:
            self._codec(self.recipe.nodes["text-codec"])
        for training in self.trained:
            self._train(training, folder)
        if "evaluate" in self.recipe.nodes and "text-codec" in self.recipe.nodes and self.trained:
            self._draw(self.recipe.nodes["evaluate"])
        return self.found

    def _time(self, name: str, work: Callable[[], object], each: int = 1) -> None:
        self.meet()
        self.found[name] = rate_of(work) / each

    def _product(self, torch: Any) -> None:
        a = torch.randn(PRODUCT, PRODUCT, device=self.device)
        self.meet()
        self.found["flops"] = 2 * PRODUCT**3 / rate_of(lambda: (a @ a)[0, 0].item())

    @cached_property
    def scenes(self) -> list[Any]:
        from examples.little_web.compose import all_scenes

        return random.Random(0).sample(all_scenes(), PICTURES)

    @cached_property
    def captions(self) -> list[str]:
        from examples.little_web.compose import caption

        return [caption(scene, random.Random(0)) for scene in self.scenes]

    @cached_property
    def pictures(self) -> list[bytes]:
        """Bytes of JPEG files."""
        from examples.little_web.compose import render

        made = []
        for scene in self.scenes:
            buffer = io.BytesIO()
            render(scene, SIDE).save(buffer, "JPEG", quality=92)
            made.append(buffer.getvalue())
        return made

    def _store(self) -> None:
        """Making a picture as it is stored, by the first node that does."""
        from stages.shards.images import ImageConfig
        from stages.shards.picture import ImageResizer

        configs = [node.config for node in self.recipe.nodes.values() if isinstance(node.config, ImageConfig)]
        if configs:
            resizer = ImageResizer(configs[0])
            self._time("store", lambda: [resizer(io.BytesIO(picture)) for picture in self.pictures], PICTURES)

    def _filter(self, node: Node) -> None:
        from stages.filter.look import Look, Looking
        from stages.shards.box import boxed

        config: Any = node.config
        scorer = None
        if config.clip_scores:
            from stages.filter.heads import Heads, Scorer

            start = time.perf_counter()
            scorer = Scorer(config.clip, True, Heads(), config.precision)
            self.found["load_clip"] = time.perf_counter() - start
        looking = Looking(scorer.preprocesses if scorer else ())
        self._time("look", lambda: [boxed(looking, picture) for picture in self.pictures], PICTURES)
        if scorer is not None:
            views = [look.seen for picture in self.pictures if isinstance(look := boxed(looking, picture), Look)]
            self._time("score", lambda: scorer(views, self.captions)["clip"].cpu(), PICTURES)

    def _encode(self, node: Node) -> None:
        import torch

        from stages.encode.square import Squared, Squaring
        from stages.shards.box import boxed
        from stages.shards.feed import on_device
        from unidiffuser.encoders import ImageLatents

        config: Any = node.config
        half = config.precision == "bf16" or (config.precision == "auto" and self.device == "cuda")
        start = time.perf_counter()
        vae = ImageLatents.load(config.vae, self.device, torch.bfloat16 if half else torch.float32)
        self.found.setdefault("load_vae", time.perf_counter() - start)
        squaring = Squaring(config.size, None)
        shown = [found for picture in self.pictures if isinstance(found := boxed(squaring, picture), Squared)]
        if not shown:
            return
        self._time(f"square {node.name}", lambda: [boxed(squaring, picture) for picture in self.pictures], PICTURES)
        pixels = [found.pixels for found in shown]
        self._time(f"vae {node.name}", lambda: vae.moments(on_device(pixels, self.device)).cpu(), len(pixels))

    @cached_property
    def text(self) -> Any:
        from unidiffuser.encoders import ClipEncoder

        config: Any = self.recipe.nodes["text-codec"].config
        return ClipEncoder.load(config.text, self.device)

    @cached_property
    def codec(self) -> Any:
        from unidiffuser.text_decoder import TextCodec

        config: Any = self.recipe.nodes["text-codec"].config
        return TextCodec.new(config.gpt2, self.text.text_width, config.latent_width).to(self.device)

    def _codec(self, node: Node) -> None:
        """Of the node that trains alone one process measures, with all cores, and the others wait."""
        import torch

        from training.optimizers.adamw import AdamW

        config: Any = node.config
        start = time.perf_counter()
        codec, clip = self.codec, self.text
        self.found["load_codec"] = time.perf_counter() - start
        self._time("text", lambda: codec.encode(clip.tokens(self.captions)).cpu(), PICTURES)
        self.meet()
        if self.rank == 0:
            torch.set_num_threads(os.cpu_count() or 1)
            batch = (self.captions * config.batch)[: config.batch]
            latent = codec.encode(clip.tokens(batch).clone()).detach()
            self.found["decode"] = rate_of(lambda: codec.eval().decode(latent, beams=config.beams)) / config.batch
            if config.weights is None:
                optimizer = AdamW(lr=1e-9).build(codec.named_parameters())

                def step() -> None:
                    codec.train().loss(codec.encode(clip.tokens(batch).clone()), batch, config.noise).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

                self.found["codec_step"] = rate_of(step)
            torch.set_num_threads(1)
        self.meet()

    def _train(self, training: Training, folder: Path) -> None:
        """The trainer's own steps by as many processes as train; the others wait."""
        from pipelines.planning.steps import seconds_a_step

        self.meet()
        workers = training.config.fewest_workers
        if self.rank < workers:
            begin, step = seconds_a_step(training, self.rank, workers, folder, self.device)
            self.found |= {f"begin {training.node}": begin, f"step {training.node}": step}
        self.meet()

    def _draw(self, node: Node) -> None:
        """Samples of an untrained network: what a call of it costs, and what is around the calls."""
        import torch

        from pipelines.planning.steps import modalities
        from stages.drawing.pictures import sample_sheet  # noqa: F401
        from training.loop import uvit_config
        from unidiffuser.encoders import ClipEncoder, ImageLatents
        from unidiffuser.generation import UniDiffuser
        from unidiffuser.uvit import UViT

        config: Any = node.config
        training = self.trained[-1]
        uvit = UViT(uvit_config(training.config, modalities(training))).to(self.device)
        image = self.text if config.text == config.clip else ClipEncoder.load(config.clip, self.device)
        model = UniDiffuser(uvit, ImageLatents.load(config.vae, self.device), image, self.text, self.codec)
        count = min(config.batch, DRAWN)
        most = max(FEW + 1, min(config.steps, MORE))
        prompts, shown = (self.captions * count)[:count], [_open(picture) for picture in (self.pictures * count)[:count]]

        def draw(task: str, steps: int) -> Callable[[], object]:
            given = {"prompts": prompts} if task == "t2i" else {"images": shown}

            def work() -> None:
                made = model.generate(
                    task, count=1, seeds=range(count), steps=steps, guidance=config.guidance, sampler=config.sampler,
                    beams=config.beams, batch=count, mark=False, **given,
                )  # fmt: skip
                for image in [each.image for each in made if each.image is not None]:
                    image.save(io.BytesIO(), "PNG")

            return work

        torch.set_num_threads(1)
        for task in ("t2i", "i2t"):
            self.meet()
            few, more = rate_of(draw(task, FEW), 0.0), seconds_of(draw(task, most))
            call = max(more - few, 0.0) / (most - FEW)
            self.found |= {f"call {task}": call / count, f"around {task}": max(few - FEW * call, 0.0) / count}


def _open(picture: bytes) -> Any:
    from unidiffuser.images import open_picture

    return open_picture(picture)
