"""Which rows are held out for validation: by a hash of their key, so that every stage, subset and run agrees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

# The hash is a number of so many bits.
BITS = 32
# The part of all hashes that a dataset lists, see `training.told`.
LISTED = 1 / 32


def hash_of(key: str) -> int:
    """The first 32 bits of the key's BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()[: BITS // 8], "big")


def held_out(key: str, fraction: float) -> bool:
    """Whether a key belongs to the validation rows."""
    return hash_of(key) < fraction * 2**BITS


def listed(keys: Iterable[str]) -> NDArray[np.uint32]:
    """The hashes of those keys that are in the part that is listed, ascending."""
    hashes = np.array([hash_of(key) for key in keys], np.uint32)
    return np.sort(hashes[hashes < LISTED * 2**BITS])
