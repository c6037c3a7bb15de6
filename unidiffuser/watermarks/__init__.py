"""Invisible marks in pictures, which name the checkpoint that drew them.

`tiled` needs no weights and is the default; `trustmark` takes weights by a path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

# Bits that a mark holds: the first eight hexadecimal digits of a fingerprint, by which every command finds a dataset.
CODE = 32
# Bits of the code's SHA-256 beside it: by these a detector tells a mark from what a clean picture happens to say.
CHECK = 24


@dataclass(frozen=True)
class Found:
    """A mark in a picture.

    Attributes:
        name: of the kind of mark.
        code: what was embedded, 0 .. 2^32 - 1; see `code_of`.
    """

    name: str
    code: int

    @property
    def checkpoint(self) -> str | None:
        """The first eight digits of the checkpoint's fingerprint; None if what drew the picture did not know it."""
        return f"{self.code:08x}" if self.code else None


class Watermark(Protocol):
    """A kind of mark.

    Attributes:
        name: what is said of a picture that has it.
        smallest: pixels of the shorter side of a picture that can hold it.
    """

    name: str
    smallest: int

    def embed(self, picture: Image, code: int) -> Image:
        """An RGB picture with a mark, of the same size."""

    def find(self, picture: Image) -> Found | None:
        """The mark in a picture."""


def code_of(provenance: Mapping[str, Any]) -> int:
    """What a mark says of a checkpoint with this provenance: the first 32 bits of its fingerprint; 0 if it has none."""
    return int(provenance.get("fingerprint", "0")[: CODE // 4], 16)


def check_of(code: int) -> int:
    """The first `CHECK` bits of the SHA-256 of a code."""
    return int.from_bytes(hashlib.sha256(code.to_bytes(CODE // 8, "big")).digest()[: CHECK // 8], "big")
