"""What encode's networks see of a picture: it is decoded once for both of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unidiffuser.clip_preprocess import Preprocess
from unidiffuser.images import PictureError, open_picture, to_square


@dataclass(frozen=True)
class Squared:
    """Of one picture: the autoencoder's square, (size, size, 3) uint8, and what CLIP sees of it, (height, width, 3) uint8."""

    pixels: np.ndarray
    clip: np.ndarray | None


@dataclass(frozen=True)
class Squaring:
    """Makes `Squared` of a picture's bytes.

    Attributes:
        size: side of the square in pixels.
        clip: how CLIP sees pictures; None where it is not asked.
    """

    size: int
    clip: Preprocess | None

    def __call__(self, data: bytes) -> Squared | str:
        """What they see, or why the row is dropped."""
        try:
            image = open_picture(data)
        except PictureError:
            return "undecodable"
        if min(image.size) < self.size:
            return "smaller_than_encoded_size"
        square = to_square(image, self.size)
        return Squared(np.asarray(square), None if self.clip is None else np.asarray(self.clip.seen(square)))
