"""Samples against the truth: are the attributes right, do picture and caption agree, are the distributions those of the world?

An unreadable picture or caption has no attribute right, agrees with nothing, and is a category of its own whose true
probability is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import torch

from examples.shapes.autoencoder import Autoencoder
from examples.shapes.codec import decode_captions, encode_captions
from examples.shapes.pictures import SIDE, read_picture, render
from examples.shapes.world import SCENES, VALUES, Scene, draw, draw_captions, joint, read_caption
from unidiffuser.sampling import sample
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.uvit import UViT

FLOOR_ROUNDS = 200
CODEC_PICTURES = 3


TASKS = ("t2i", "i2t", "joint", "i", "t")
# Scenes that drawn pictures show, and that drawn captions say; None what cannot be read.
Read = list[Scene | None]


@dataclass(frozen=True)
class Protocol:
    """How samples are drawn: so many of each task with an input and of each without one.

    Guidance serves the conditional tasks alone: it sharpens, and so would change what the others are measured by. Fresh noise at
    every step forgets what the network got slightly wrong at the steps before.
    """

    conditional: int = 400
    unconditional: int = 20000
    steps: int = 50
    sampler: str = "dpm++2m-sde"
    guidance: float = 1.0
    batch: int = 250
    seed: int = 1_000_000
    condition_t: int = 0


def accuracy(wanted: Sequence[Scene | None], got: Sequence[Scene | None]) -> dict[str, float]:
    """Share of scenes in which each attribute is as wanted; `attributes` is their mean, `all` the share with all four right."""
    pairs = list(zip(wanted, got, strict=True))
    shares = {
        name: sum(a is not None and b is not None and a[n] == b[n] for a, b in pairs) / len(pairs)
        for n, name in enumerate(VALUES)
    }
    whole = sum(a is not None and a == b for a, b in pairs) / len(pairs)
    return {**shares, "attributes": sum(shares.values()) / len(shares), "all": whole, "unreadable": share_unreadable(got)}


def share_unreadable(scenes: Sequence[Scene | None]) -> float:
    return sum(scene is None for scene in scenes) / len(scenes)


def total_variation(counts: np.ndarray, unreadable: int, truth: np.ndarray) -> float:
    """Half the L1 distance between sampled and true distribution.

    Args:
        counts: samples a category, in the shape of `truth`.
        unreadable: samples in no category.
        truth: probabilities, which sum to one.
    """
    total = counts.sum() + unreadable
    return float(0.5 * (np.abs(counts / total - truth).sum() + unreadable / total))


def variations(counts: np.ndarray, unreadable: int) -> dict[str, float]:
    """Total variation of every attribute, of every two together (`pairs` is the largest), and of the whole joint distribution.

    Args:
        counts: samples by colour, form, place and count, (4, 3, 4, 2).
    """

    def variation(kept: tuple[int, ...]) -> float:
        others = tuple(axis for axis in range(counts.ndim) if axis not in kept)
        return total_variation(counts.sum(others), unreadable, joint().sum(others))

    axes = range(counts.ndim)
    single = {name: variation((axis,)) for axis, name in enumerate(VALUES)}
    return {
        **single,
        "largest": max(single.values()),
        "pairs": max(variation(pair) for pair in combinations(axes, 2)),
        "joint": variation(tuple(axes)),
    }


@lru_cache
def floor(samples: int) -> dict[str, float]:
    """What `variations` gives on average for that many samples of the true distribution."""
    rng, truth = np.random.default_rng(0), joint()
    rounds = [variations(rng.multinomial(samples, truth.ravel()).reshape(truth.shape), 0) for _ in range(FLOOR_ROUNDS)]
    return {name: float(np.mean([each[name] for each in rounds])) for name in rounds[0]}


def distribution(scenes: Sequence[Scene | None]) -> dict[str, Any]:
    """`variations` of sampled scenes, with their floor and the share of unreadable ones."""
    places = {scene: number for number, scene in enumerate(SCENES)}
    readable = [places[scene] for scene in scenes if scene is not None]
    counts = np.bincount(readable, minlength=len(SCENES)).reshape(joint().shape)
    found = variations(counts, len(scenes) - len(readable))
    return {**found, "unreadable": share_unreadable(scenes), "floor": floor(len(scenes))}


class Artist:
    """A trained network with its codec, which draws pictures (n, 64, 64, 3), uint8, and writes captions; one sample a seed."""

    def __init__(self, model: UViT, codec: Autoencoder, protocol: Protocol) -> None:
        self.model, self.codec, self.protocol = model.eval(), codec, protocol
        self.schedule = NoiseSchedule.of(model.config.noise)

    def paint(self, captions: list[str], first: int = 0) -> np.ndarray:
        """Text to image: a picture for each caption, with the seeds from `first` on."""
        return self.codec.decode(self._latents("t2i", first, len(captions), {"text": encode_captions(captions)})["latent"])

    def describe(self, pictures: np.ndarray, first: int = 0) -> list[str]:
        """Image to text: a caption for each picture."""
        given = {"latent": self.codec.encode(pictures)}
        return decode_captions(self._latents("i2t", first, len(pictures), given)["text"])

    def imagine(self, count: int, first: int = 0) -> tuple[np.ndarray, list[str]]:
        """Joint: pictures with their captions."""
        drawn = self._latents("joint", first, count)
        return self.codec.decode(drawn["latent"]), decode_captions(drawn["text"])

    def pictures(self, count: int, first: int = 0) -> np.ndarray:
        """Image only."""
        return self.codec.decode(self._latents("i", first, count)["latent"])

    def captions(self, count: int, first: int = 0) -> list[str]:
        """Text only."""
        return decode_captions(self._latents("t", first, count)["text"])

    def _latents(
        self, task: str, first: int, count: int, given: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        settings = self.protocol
        seeds = range(settings.seed + first, settings.seed + first + count)
        drawn = sample(
            self.model, task, self.model.config.modalities, settings.batch, settings.steps, settings.guidance if given else 0.0,
            seeds, settings.sampler, given, settings.condition_t if given else 0, schedule=self.schedule,
        )  # fmt: skip
        return {name: values.cpu() for name, values in drawn.items()}


def asked(protocol: Protocol) -> tuple[list[Scene], list[str], np.ndarray]:
    """Scenes with captions and pictures that training never saw, which the tasks with an input are given."""
    rng = np.random.default_rng(protocol.seed)
    scenes = draw(rng, protocol.conditional)
    return scenes, draw_captions(scenes, rng), np.stack([render(scene, rng) for scene in scenes])


def read_samples(artist: Artist, task: str, start: int, stop: int) -> tuple[Read, Read]:
    """What samples `start` to `stop` - 1 of a task show and what they say; empty where it draws no pictures, or no captions."""
    pictures, captions = np.empty((0, SIDE, SIDE, 3), np.uint8), list[str]()
    if task in ("t2i", "i2t"):
        _, texts, seen = asked(artist.protocol)
        if task == "t2i":
            pictures = artist.paint(texts[start:stop], start)
        else:
            captions = artist.describe(seen[start:stop], start)
    elif task == "joint":
        pictures, captions = artist.imagine(stop - start, start)
    elif task == "i":
        pictures = artist.pictures(stop - start, start)
    else:
        captions = artist.captions(stop - start, start)
    return [read_picture(np.asarray(picture)) for picture in pictures], [read_caption(text) for text in captions]


def codec_accuracy(codec: Autoencoder) -> dict[str, float]:
    """`accuracy` of every scene's picture after it went through the codec: the ceiling of the tasks that draw pictures."""
    rng = np.random.default_rng(0)
    scenes = [scene for scene in SCENES for _ in range(CODEC_PICTURES)]
    decoded = codec.decode(codec.encode(np.stack([render(scene, rng) for scene in scenes])))
    return accuracy(scenes, [read_picture(picture) for picture in decoded])


def measure(codec: Autoencoder, protocol: Protocol, read: dict[str, tuple[Read, Read]]) -> dict[str, Any]:
    """All five distributions of one network, measured, of what `read_samples` gave for each task."""
    scenes, _, _ = asked(protocol)
    shown, said = read["joint"]
    return {
        "codec": codec_accuracy(codec),
        "t2i": accuracy(scenes, read["t2i"][0]),
        "i2t": accuracy(scenes, read["i2t"][1]),
        "joint": {"consistency": accuracy(said, shown), "image": distribution(shown), "text": distribution(said)},
        "i": distribution(read["i"][0]),
        "t": distribution(read["t"][1]),
    }
