"""Which caption of a row is read, where rows have several: a function of the seed and the sample's place in the training.

A shard has the text latents of a row's own caption in `text`, and those of a further caption NAME in `text.NAME`, null where a
row has none. Each time that a row is read one of them is drawn: at place g the number u in 0 .. 1 of `training.draws` falls into
the stretch of one of the names, in the order of the alphabet, or behind all of them, where the row's own caption is. A null is
the row's own caption too. So is what a shard without the column has. The held-out rows of a validation draw theirs likewise, by
their number, the same ones every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import draws

# Second word of the key, so that no other draw of a training has these numbers.
KEY = 2
PREFIX = "text."


def column_of_caption(name: str) -> str:
    """The column of the text latents of a further caption."""
    return f"{PREFIX}{name}"


def drawn(probabilities: Mapping[str, float], seed: int, stream: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers (n,) of the captions at places (n,): of the names in their order, or how many there are for the row's own."""
    ends = np.cumsum([probabilities[name] for name in sorted(probabilities)])
    return np.searchsorted(ends, draws.uniform(seed, KEY, places, 1, stream)[:, 0], side="right")


def texts(
    probabilities: Mapping[str, float], seed: int, stream: int, places: NDArray[np.int64], rows: Mapping[str, NDArray[Any]]
) -> NDArray[np.float16]:
    """The text latents that are read of the rows at places (n,), (n, L, d); `rows` has them of each caption, (n, L, d)."""
    if not probabilities:
        return rows["text"]
    chosen, found = drawn(probabilities, seed, stream, places), rows["text"].copy()
    for number, name in enumerate(sorted(probabilities)):
        found[chosen == number] = rows[column_of_caption(name)][chosen == number]
    return found
