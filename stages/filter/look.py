"""What is measured and shown to networks of a picture, which is decoded once for all of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.filter.likeness import colours, perceptual_hash
from unidiffuser.clip_preprocess import Preprocess
from unidiffuser.images import PictureError, open_picture


@dataclass(frozen=True)
class Look:
    """Of one picture: its size in pixels, what near duplicates are told by, and what each CLIP sees, (h, w, 3) uint8."""

    width: int
    height: int
    phash: bytes
    colours: bytes
    seen: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Looking:
    """Makes a `Look` of a picture's bytes; `clips` is how each CLIP sees pictures."""

    clips: tuple[Preprocess, ...]

    def __call__(self, data: bytes) -> Look | str:
        """What is measured, or why the row is dropped: the bytes are no picture, or end early."""
        try:
            image = open_picture(data)
        except PictureError:
            return "undecodable"
        seen = tuple(np.asarray(clip.seen(image)) for clip in self.clips)
        return Look(image.width, image.height, perceptual_hash(image), colours(image), seen)
