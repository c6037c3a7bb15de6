"""What is known of LAION's sets and of fetching them: rows, shares and bytes, used where nothing has been measured.

Sources: the announcement of LAION-5B (laion.ai/blog/laion-5b), the data cards of the sets, img2dataset's notes on fetching
laion2B-en and laion-high-resolution, arXiv 2303.12733 on near duplicates; of the demo's own web, how it is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Bytes of a stored picture by its size: 10 TB for the 400 million of LAION-400M at 256 px; 84.8 TiB at 384 px for the two thirds
# of laion2B-en that came; 50 TB at 1,024 px for as many of laion-high-resolution.
PICTURE: dict[float, float] = {256: 25e3, 384: 60e3, 1024: 440e3}
# Bytes of a row of metadata in Parquet.
ROW = 140.0


def between(points: Mapping[float, float], at: float) -> float:
    """A value between known points, on a line in logarithms; beyond the ends as between the last two.

    >>> round(between({256: 25e3, 1024: 400e3}, 512))
    100000
    """
    known = sorted(points)
    right = next((place for place in known[1:-1] if at <= place), known[-1])
    left = known[known.index(right) - 1]
    slope = math.log(points[right] / points[left]) / math.log(right / left)
    return points[left] * (at / left) ** slope


@dataclass(frozen=True)
class Corpus:
    """A set of links, and the shares of its rows that stay.

    Attributes:
        least: pixels that every picture has on its shorter side.
        sides: pixels of the shorter side -> share of laion2B-en with so many or more; 1,324, 488 and 76 million of 2.32 billion.
        safe, unmarked: 2.9% are taken for unsafe, 6.1% for watermarked.
        aesthetic: 600 million have a predicted score of 5 or more.
        alive: about a third of the links are dead.
        distinct: about 30% are near duplicates of another picture.
        sent: bytes of a picture as its server sends it.
        picture: bytes of a picture as it is stored, where that does not go by `PICTURE`.
    """

    name: str
    rows: float
    least: int = 1
    sides: Mapping[float, float] = field(default_factory=lambda: {1: 1.0, 128: 0.9, 256: 0.571, 512: 0.210, 1024: 0.033})
    safe: float = 0.971
    unmarked: float = 0.939
    aesthetic: float = 0.26
    alive: float = 2 / 3
    distinct: float = 0.7
    sent: float = 250e3
    picture: float | None = None

    def share_of_side(self, side: int | None, least: int = 1) -> float:
        """Of pictures with `least` pixels or more on the shorter side, the share with `side`."""
        least = max(least, self.least)
        return between(self.sides, side) / between(self.sides, least) if side is not None and side > least else 1.0

    def stored(self, size: int) -> float:
        """Bytes of a picture that was resized to `size` pixels on its shorter side."""
        return self.picture or between(PICTURE, size)


def _little(name: str, rows: int) -> Corpus:
    return Corpus(name, rows, 1, {1: 1.0, 256: 0.985, 640: 0.985}, 1, 1, 0.985, 0.94, 0.99, 22e3, 22e3)


# By a part of the names of their files; the first that fits counts.
CORPORA = (
    Corpus("relaion2B-en", 2.098e9), Corpus("laion2B-en", 2.32e9),
    # At 280 pictures a second a line of 2 Gbit/s was full.
    Corpus("laion-high-resolution", 166e6, 1024, sent=890e3),
    Corpus("laion-aesthetics", 600e6, aesthetic=1.0),
    _little("little-web", 1000), _little("base-web", 12_000),
)  # fmt: skip
# A folder of one's own, or links of which nothing is known: all stay.
OWN = Corpus("", 0, 1, {1: 1.0, 2: 1.0}, 1, 1, 1, 1, 1)


def corpus_of(config: Any) -> Corpus:
    """The set that a select's metadata is of, by its preset, its schema or the files' names."""
    named: Sequence[str] = [config.preset or "", config.laion_schema, *config.metadata]
    return next((corpus for corpus in CORPORA if any(corpus.name in name for name in named)), OWN)
