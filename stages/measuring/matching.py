"""How well pictures and captions go together, by CLIP: the CLIP score both ways, and a preference between floor and ceiling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from stages.measuring.measure import DIGITS, Figure, Measure, Result
from stages.measuring.networks import judge_of
from stages.measuring.samples import Asked, Need

if TYPE_CHECKING:
    from stages.measuring.view import View
    from stages.runner.contract import Output


class _Pairs(Measure):
    """Compares CLIP embeddings of pictures with those of captions."""

    count: int | None = Field(None, ge=2, description="pairs; as many as the evaluation has captions when not given")

    def pairs(self, asked: Asked) -> dict[str, tuple[Need, Need]]:
        """Name -> what gives the pictures and what gives the captions."""
        count = min(self.count or asked.count, asked.count)
        drawn, given = Need(asked.samples("t2i"), count, "clip-image"), Need(None, count, "clip-text")
        found = {"t2i": (drawn, given)}
        if asked.pictures:
            real = Need(None, count, "clip-image")
            found |= {"i2t": (real, Need(asked.samples("i2t"), count, "clip-text")), "real": (real, given)}
        return found

    def needs(self, asked: Asked) -> list[Need]:
        return [need for pair in self.pairs(asked).values() for need in pair]


class ClipScore(_Pairs):
    """A hundred times the mean cosine of both embeddings, or 0 where that is negative, as torchmetrics has it (arXiv 2104.08718).

    Of pictures drawn for held-out captions, of captions written for held-out pictures, and of the held-out pairs themselves.
    """

    kind: Literal["clip-score"] = Field("clip-score", description="100 x the cosine of CLIP's embeddings, each way")

    def result(self, view: View, out: Output) -> Result:
        by = f"clip {judge_of(view.job.config)}"
        figures = []
        for name, (image, text) in self.pairs(view.asked).items():
            score = clip_score(view.features(image), view.features(text))
            better: Literal["higher"] | None = "higher" if name != "real" else None
            figures.append(Figure(f"clip_score_{name}", round(score, DIGITS), better, image.count, by))
        return Result(figures)


class Preference(_Pairs):
    """How often CLIP finds a caption closer to the picture that was made for it than to one that was made for another caption.

    The untrained network gives the floor, the real pictures the ceiling.
    """

    kind: Literal["preference"] = Field(
        "preference", description="how often CLIP finds a caption closer to its own picture than to another's"
    )
    untrained: int = Field(50, ge=2, description="captions that the untrained network gets, for the floor")

    def pairs(self, asked: Asked) -> dict[str, tuple[Need, Need]]:
        found = super().pairs(asked)
        count = min(self.untrained, found["t2i"][0].count)
        floor = Need(asked.samples("t2i", of="untrained"), count, "clip-image")
        return found | {"untrained": (floor, Need(None, count, "clip-text"))}

    def result(self, view: View, out: Output) -> Result:
        by = f"clip {judge_of(view.job.config)}"
        figures = []
        for name, (image, text) in self.pairs(view.asked).items():
            share = preference(view.features(image), view.features(text))
            better: Literal["higher"] | None = "higher" if name in ("t2i", "i2t") else None
            figures.append(Figure(f"preference_{name}", round(share, DIGITS), better, image.count, by))
        return Result(figures)


def _unit(rows: np.ndarray) -> np.ndarray:
    values = rows.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def clip_score(images: np.ndarray, texts: np.ndarray) -> float:
    """Of embeddings (n, D) of pictures and of their captions."""
    return max(0.0, float(100 * (_unit(images) * _unit(texts)).sum(1).mean()))


def preference(images: np.ndarray, texts: np.ndarray) -> float:
    """Share of pairs in which a caption is closer to its own picture than to that of another prompt.

    The n-th caption is paired with the picture of the prompt half the list further on, so that neighbours in the file, which may
    be alike, never meet. A tie counts half.
    """
    image, text = _unit(images), _unit(texts)
    own = (text * image).sum(1)
    other = (text * np.roll(image, len(image) // 2, 0)).sum(1)
    # The same picture twice is a tie, whatever the rounding.
    tie = np.isclose(own, other, rtol=0, atol=1e-9)
    return float(np.where(tie, 0.5, own > other).mean())
