"""What samples of one kind are worth in a number or two, for measures that compare many kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from stages.measuring.matching import clip_score
from stages.measuring.pictures import fid, fid_note
from stages.measuring.samples import Asked, Need, Network, Samples

if TYPE_CHECKING:
    from stages.measuring.view import View

Features = Literal["clip", "inception", "scenes"]
Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Score:
    """One number of samples of a kind.

    Attributes:
        needs: what is read, in the order in which `of` takes their features.
        note: what is to be said beside it.
    """

    name: str
    better: Better
    needs: tuple[Need, ...]
    of: Callable[..., float]
    note: str = ""

    def value(self, view: View) -> float:
        return self.of(*(view.features(need) for need in self.needs))


def scores_of(samples: Samples, asked: Asked, features: Features, count: int) -> list[Score]:
    """Of text to image, image to text, or image only.

    Args:
        features: clip or inception: FID over it, and the CLIP score; scenes: accuracies and total variation of the world of
            shapes.
    """
    if features == "scenes":
        return [_of_scenes(samples, count)]
    real = Need(None, count, "clip-image")
    if samples.task == "i2t":
        return [Score("clip_score_i2t", "higher", (real, Need(samples, count, "clip-text")), clip_score)]
    drawn = Need(samples, count, "clip-image")
    found = [Score("clip_score_t2i", "higher", (drawn, Need(None, count, "clip-text")), clip_score)]
    if asked.pictures:
        network: Network = "inception" if features == "inception" else "clip-image"
        name = "fid" if features == "inception" else "fid_clip"
        found.append(Score(name, "lower", (Need(samples, count, network), Need(None, count, network)), fid, fid_note(count)))
    return found


def _of_scenes(samples: Samples, count: int) -> Score:
    if samples.task == "i":
        return Score("image_tv", "lower", (Need(samples, count, "scenes-shown"),), total_variation)
    network: Network = "scenes-shown" if samples.task == "t2i" else "scenes-said"
    needs = (Need(samples, count, network), Need(None, count, "scenes-said"))
    return Score(f"{samples.task}_accuracy", "higher", needs, lambda found, wanted: float((found == wanted).mean()))


def total_variation(numbers: np.ndarray) -> float:
    """Of scenes by number (n, 1), -1 where unreadable, from the world's own distribution."""
    from examples.shapes.measure import variations
    from examples.shapes.world import joint

    readable = numbers[numbers >= 0].astype(int)
    counts = np.bincount(readable, minlength=joint().size).reshape(joint().shape)
    return variations(counts, len(numbers) - len(readable))["joint"]
