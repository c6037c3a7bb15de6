"""Who draws the samples of a checkpoint: the model with its encoders, or the small one of a world of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from infra.dataset import fetch_files
from infra.external import fetch_outside
from infra.scratch import scratch_folder
from stages.catalog import MADE_STAGES
from stages.measuring.checkpoint import OUTSIDE, model_folder
from stages.measuring.damage import damaged
from stages.measuring.prompts import Prompts
from stages.measuring.rows import HELD_OUT, Rows
from stages.measuring.samples import Samples
from stages.measuring.worlds import WorldPrompts
from stages.runner.contract import Job, StageError

# What the picture codec is called in the dataset of its world.
CODEC = "codec.safetensors"
Drawn = tuple[list[Any] | None, list[str] | None]


class Model:
    """A model with its encoders, loaded when it first draws.

    Class attributes:
        at_once: samples of a unit, which is what is lost when a worker dies.
    """

    at_once: ClassVar[int] = 25

    def __init__(self, job: Job) -> None:
        self.job, self.config = job, job.config
        self.held_out = self.prompts(job)

    @staticmethod
    def prompts(job: Job) -> Prompts | Rows:
        rows = job.inputs.get(HELD_OUT)
        return Prompts(job.sources, job.config.count) if rows is None else Rows(rows, job.config.count)

    @cached_property
    def unidiffuser(self) -> Any:
        from unidiffuser.generation import UniDiffuser

        with model_folder(self.job) as folder:
            return UniDiffuser.load(folder, device=_device())

    @cached_property
    def trained(self) -> Any:
        return self.unidiffuser.uvit

    @cached_property
    def untrained(self) -> Any:
        """A network of the same size that has learned nothing."""
        return _untrained(self.trained, self.config.seed)

    @cached_property
    def before(self) -> Any:
        """The network that training began from."""
        from unidiffuser.weights import load_native

        job = self.job
        with scratch_folder() as scratch:
            folder = fetch_outside(job.lists["before"], job.config.before, job.store, scratch)
            return load_native(folder / "uvit").to(_device()).eval()

    def network(self, samples: Samples) -> Any:
        """The one whose samples are asked for."""
        trained = self.trained  # the others stand in its place, so it is taken out first
        return trained if samples.of == "checkpoint" else self.untrained if samples.of == "untrained" else self.before

    def draw(self, samples: Samples, start: int, stop: int) -> Drawn:
        """Pictures and captions of the samples `start` to `stop` - 1, each None where the task has none.

        Raises:
            StageError: a network computes what is not finite.
        """
        from unidiffuser.tensors import NotFinite

        inputs: dict[str, Any] = {}
        if samples.task == "t2i":
            inputs["prompts"] = damaged(samples.damage, self.held_out.captions(start, stop), start)
        elif samples.task == "i2t":
            inputs["images"] = damaged(samples.damage, self.held_out.images(start, stop), start)
        self.unidiffuser.uvit = self.network(samples)
        first = self.config.seed + start
        try:
            drawn = self.unidiffuser.generate(
                samples.task, count=1 if inputs else stop - start, seeds=range(first, first + stop - start), steps=samples.steps,
                guidance=samples.guidance, sampler=samples.sampler, beams=samples.beams, batch=self.config.batch,
                condition_t=samples.condition_t, data_type=self.config.data_type, mark=False, **inputs,
            )  # fmt: skip
        except NotFinite as error:
            raise StageError(f"{self.job.node}: {error}; or the checkpoint has diverged") from None
        images, captions = [each.image for each in drawn], [each.caption for each in drawn]
        return (images if images[0] is not None else None), (captions if captions[0] is not None else None)


class World:
    """The network of a world of its own with the codec of that."""

    at_once: ClassVar[int] = 2000

    def __init__(self, job: Job) -> None:
        self.job, self.config = job, job.config
        self.held_out = self.prompts(job)

    @staticmethod
    def prompts(job: Job) -> WorldPrompts:
        return WorldPrompts(job.config.count, job.config.seed)

    @cached_property
    def codec(self) -> Any:
        from safetensors.torch import load_file

        from examples.shapes.autoencoder import Autoencoder

        with scratch_folder() as scratch:
            folder = fetch_files(self.job.store, [self.job.inputs["codec"].file(CODEC)], scratch / "codec")
            return Autoencoder.of(load_file(folder / CODEC)).to(_device())

    @cached_property
    def trained(self) -> Any:
        from training.shares import merge
        from unidiffuser.weights import load_native

        with scratch_folder() as scratch:
            checkpoint, folder = self.job.inputs["checkpoint"].fetch(scratch / "checkpoint"), scratch / "model"
            folder.mkdir()
            shutil.copyfile(checkpoint / "config.json", folder / "config.json")
            merge(checkpoint, self.config.weights, folder / "model.safetensors")
            return load_native(folder).to(_device())

    @cached_property
    def untrained(self) -> Any:
        """A network of the same size that has learned nothing."""
        return _untrained(self.trained, self.config.seed)

    def artist(self, samples: Samples) -> Any:
        """What draws in one way."""
        from examples.shapes.measure import Artist, Protocol

        protocol = Protocol(
            conditional=self.config.count, steps=samples.steps, sampler=samples.sampler, guidance=samples.guidance,
            batch=self.config.batch, seed=self.config.seed, condition_t=samples.condition_t,
        )  # fmt: skip
        return Artist(self.untrained if samples.of == "untrained" else self.trained, self.codec, protocol)

    def draw(self, samples: Samples, start: int, stop: int) -> Drawn:
        """As `Model.draw`."""
        artist, count = self.artist(samples), stop - start
        if samples.task == "t2i":
            return _pictures(artist.paint(damaged(samples.damage, self.held_out.captions(start, stop), start), start)), None
        if samples.task == "i2t":
            given = damaged(samples.damage, self.held_out.images(start, stop), start)
            seen = np.stack([np.asarray(picture) for picture in given])
            return None, artist.describe(seen, start)
        if samples.task == "joint":
            pictures, captions = artist.imagine(count, start)
            return _pictures(pictures), captions
        if samples.task == "i":
            return _pictures(artist.pictures(count, start)), None
        return None, artist.captions(count, start)


Painter = Model | World


def painter_of(job: Job) -> type[Painter]:
    """Who draws the job's checkpoint: its codec says it."""
    codec = job.inputs.get("codec")
    own = codec is not None and codec.manifest.stage in MADE_STAGES and OUTSIDE not in job.lists
    return World if own else Model


def _pictures(drawn: Sequence[Any]) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(np.asarray(picture)) for picture in drawn]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _untrained(trained: Any, seed: int) -> Any:
    import torch

    from unidiffuser.uvit import UViT

    torch.manual_seed(seed)
    return UViT(trained.config).to(_device()).eval()
