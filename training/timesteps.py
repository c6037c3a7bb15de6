"""The timesteps of a sample, one for each modality: a function of the seed and the sample's place in the training.

`sobol` takes point g of a scrambled Sobol sequence for place g: each timestep is uniform and they are independent, as if drawn,
but every stretch of places has close to its share of each combination of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from training import draws

Ints = NDArray[np.int64]

# Second word of the key, so that no other draw of a training has these numbers.
KEY = 1
# The bits of torch's Sobol sequences, which so have 2**30 points; the next of as many places take another scrambling.
BITS = 30


def timesteps_at(kind: Literal["uniform", "sobol"], seed: int, places: Ints, modalities: int, last: int) -> Ints:
    """Timesteps 1 .. last, (n, modalities), of the samples at places (n,) of the training, n of 1 or more."""
    drawn = draws.uniform(seed, KEY, places, modalities) if kind == "uniform" else _sobol(seed, places, modalities)
    return 1 + (drawn * last).astype(np.int64)


def _sobol(seed: int, places: Ints, modalities: int) -> NDArray[np.float64]:
    """Points of the scrambled sequence, (n, modalities), by their place."""
    sequences, points = np.divmod(places, 2**BITS)
    found = np.empty((len(places), modalities), np.int64)
    for sequence in np.unique(sequences):
        chosen = sequences == sequence
        directions, shift = _scrambled(seed, int(sequence), modalities)
        # Point n is the sum (exclusive or) of the direction numbers at the ones of n's Gray code.
        gray = points[chosen] ^ (points[chosen] >> 1)
        at = np.broadcast_to(shift, (len(gray), modalities)).copy()
        for bit in range(BITS):
            at ^= (gray >> bit & 1)[:, None] * directions[:, bit]
        found[chosen] = at
    return found.astype(np.float64) * 2.0**-BITS


@lru_cache(maxsize=4)
def _scrambled(seed: int, sequence: int, modalities: int) -> tuple[Ints, Ints]:
    """Direction numbers (modalities, BITS) and digital shift (modalities,) of torch's scrambled sequence."""
    (mixed,) = np.random.SeedSequence([seed, sequence]).generate_state(1, np.uint64)
    engine = torch.quasirandom.SobolEngine(modalities, scramble=True, seed=int(mixed >> np.uint64(1)))
    return engine.sobolstate.numpy(), engine.shift.numpy()
