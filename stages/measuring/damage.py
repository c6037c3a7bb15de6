"""What may have happened to a picture or a caption before a model is given it, and pictures of other domains."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from PIL import Image, ImageFilter, ImageOps

# Share of a picture's side: that of the square that is covered, and the radius of the blur.
COVERED, BLUR = 0.5, 0.02
JPEG_QUALITY = 10
# Chance of each word to be left out.
DROPPED = 0.3


def _masked(image: Image.Image, random: Random) -> Image.Image:
    """A grey square somewhere in it, half as wide."""
    width, height = (round(COVERED * side) for side in image.size)
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    image.paste((127, 127, 127), (left, top, left + width, top + height))
    return image


def _jpeg(image: Image.Image, _: Random) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")


def _dropped(caption: str, random: Random) -> str:
    """Without some of its words; one is left."""
    words = caption.split()
    return " ".join([word for word in words if random.random() >= DROPPED] or [random.choice(words)])


def _swapped(caption: str, random: Random) -> str:
    """Two words have changed places."""
    words = caption.split()
    if len(words) > 1:
        first, second = random.sample(range(len(words)), 2)
        words[first], words[second] = words[second], words[first]
    return " ".join(words)


PICTURES: dict[str, Callable[[Image.Image, Random], Image.Image]] = {
    "masked": _masked,
    "jpeg-10": _jpeg,
    "blurred": lambda image, _: image.filter(ImageFilter.GaussianBlur(BLUR * max(image.size))),
    "grey": lambda image, _: ImageOps.grayscale(image).convert("RGB"),
    # Of other domains: a drawing of its outlines, and a negative.
    "outlines": lambda image, _: image.filter(ImageFilter.CONTOUR),
    "negative": lambda image, _: ImageOps.invert(image),
}
CAPTIONS: dict[str, Callable[[str, Random], str]] = {"words-dropped": _dropped, "words-swapped": _swapped}


def damaged(name: str, values: Sequence[Any], first: int) -> list[Any]:
    """Pictures (PIL, RGB), or captions, damaged in one way.

    Args:
        name: in `PICTURES`, or in `CAPTIONS`; as they are if it is empty.
        first: number of the first in the held-out data: what happens to one does not depend on its neighbours.
    """
    if not name:
        return list(values)
    if name in CAPTIONS:
        return [CAPTIONS[name](value, Random(f"{name} {number}")) for number, value in enumerate(values, first)]
    return [PICTURES[name](value.copy(), Random(f"{name} {number}")) for number, value in enumerate(values, first)]
