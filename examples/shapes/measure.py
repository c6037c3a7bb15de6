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
from torch import nn

from examples.shapes.autoencoder import Autoencoder
from examples.shapes.codec import MODALITIES, SCHEDULE, decode_captions, encode_captions
from examples.shapes.pictures import read_picture, render
from examples.shapes.world import SCENES, VALUES, Scene, draw, draw_captions, joint, read_caption
from unidiffuser.sampling import sample

FLOOR_ROUNDS = 200
CODEC_PICTURES = 3


@dataclass(frozen=True)
class Protocol:
    """How samples are drawn for the final figures.

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

    def __init__(self, model: nn.Module, codec: Autoencoder, protocol: Protocol) -> None:
        self.model, self.codec, self.protocol = model.eval(), codec, protocol

    def paint(self, captions: list[str]) -> np.ndarray:
        """Text to image: a picture for each caption."""
        return self.codec.decode(self._latents("t2i", len(captions), {"words": encode_captions(captions)})["latent"])

    def describe(self, pictures: np.ndarray) -> list[str]:
        """Image to text: a caption for each picture."""
        return decode_captions(self._latents("i2t", len(pictures), {"latent": self.codec.encode(pictures)})["words"])

    def imagine(self, count: int) -> tuple[np.ndarray, list[str]]:
        """Joint: pictures with their captions."""
        drawn = self._latents("joint", count)
        return self.codec.decode(drawn["latent"]), decode_captions(drawn["words"])

    def pictures(self, count: int) -> np.ndarray:
        """Image only."""
        return self.codec.decode(self._latents("i", count)["latent"])

    def captions(self, count: int) -> list[str]:
        """Text only."""
        return decode_captions(self._latents("t", count)["words"])

    def _latents(self, task: str, count: int, given: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        settings = self.protocol
        drawn = sample(
            self.model, task, MODALITIES, settings.batch, settings.steps, settings.guidance if given else 0.0,
            range(settings.seed, settings.seed + count), settings.sampler, given, schedule=SCHEDULE,
        )  # fmt: skip
        return {name: values.cpu() for name, values in drawn.items()}


def conditional(artist: Artist, count: int, seed: int) -> dict[str, dict[str, float]]:
    """`accuracy` of text to image and of image to text, for scenes, pictures and captions that training never saw."""
    rng = np.random.default_rng(seed)
    scenes = draw(rng, count)
    captions, pictures = draw_captions(scenes, rng), np.stack([render(scene, rng) for scene in scenes])
    return {
        "t2i": accuracy(scenes, [read_picture(picture) for picture in artist.paint(captions)]),
        "i2t": accuracy(scenes, [read_caption(text) for text in artist.describe(pictures)]),
    }


def codec_accuracy(codec: Autoencoder) -> dict[str, float]:
    """`accuracy` of every scene's picture after it went through the codec: the ceiling of the tasks that draw pictures."""
    rng = np.random.default_rng(0)
    scenes = [scene for scene in SCENES for _ in range(CODEC_PICTURES)]
    decoded = codec.decode(codec.encode(np.stack([render(scene, rng) for scene in scenes])))
    return accuracy(scenes, [read_picture(picture) for picture in decoded])


def measure(artist: Artist) -> dict[str, Any]:
    """All five distributions of one network, measured."""
    protocol = artist.protocol
    result: dict[str, Any] = {"codec": codec_accuracy(artist.codec)}
    result |= conditional(artist, protocol.conditional, protocol.seed)
    pictures, captions = artist.imagine(protocol.unconditional)
    shown, said = [read_picture(picture) for picture in pictures], [read_caption(text) for text in captions]
    result["joint"] = {"consistency": accuracy(said, shown), "image": distribution(shown), "text": distribution(said)}
    result["i"] = distribution([read_picture(picture) for picture in artist.pictures(protocol.unconditional)])
    result["t"] = distribution([read_caption(text) for text in artist.captions(protocol.unconditional)])
    return result
