"""Flags, signs, bands and gradients, whose frequencies mostly are 0, and copies of pictures: for tests of near duplicates."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw

from tests.stages.packed import encoded

WIDE, HIGH = 256, 192
WHITE, RED, BLUE, GREEN, YELLOW, BLACK = (255,) * 3, (206, 17, 38), (0, 56, 147), (0, 146, 70), (255, 206, 0), (20,) * 3


def bars(*shades: tuple[int, int, int], upright: bool = False) -> Image.Image:
    parts = np.array([shades], np.uint8) if upright else np.array(shades, np.uint8)[:, None]
    return Image.fromarray(parts).resize((WIDE, HIGH), Image.Resampling.NEAREST)


def shape(ground: tuple[int, int, int], shade: tuple[int, int, int], corners: list[tuple[float, float]]) -> Image.Image:
    """One shape; corners in shares of the picture's height, from its middle."""
    picture = Image.new("RGB", (WIDE, HIGH), ground)
    ImageDraw.Draw(picture).polygon([(WIDE / 2 + x * HIGH, HIGH / 2 + y * HIGH) for x, y in corners], fill=shade)
    return picture


def regular(corners: int, turn: float = 0.0, radius: float = 0.38) -> list[tuple[float, float]]:
    angles = [2 * math.pi * corner / corners + turn for corner in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def plus(arm: float, thick: float) -> list[tuple[float, float]]:
    quarter = [(thick, thick), (thick, arm), (-thick, arm), (-thick, thick), (-arm, thick), (-arm, -thick)]
    return quarter + [(-x, -y) for x, y in quarter]


def waves(shade_low: tuple[int, int, int], shade_high: tuple[int, int, int], level: np.ndarray) -> Image.Image:
    """`level` of 0 to 1, (HIGH, WIDE), from one colour to another."""
    low, high = np.array(shade_low), np.array(shade_high)
    return Image.fromarray(np.rint(low + (high - low) * level[..., None]).astype(np.uint8))


FLAGS = {
    "tricolour upright": bars(BLUE, WHITE, RED, upright=True),
    "tricolour level": bars(BLACK, RED, YELLOW),
    "bicolour": bars(WHITE, RED),
    "cross": shape(RED, WHITE, plus(1.0, 0.1)),
    "disc": shape(WHITE, RED, regular(90, radius=0.3)),
}
ARROW = [(-0.3, -0.08), (0.05, -0.08), (0.05, -0.25), (0.35, 0.0), (0.05, 0.25), (0.05, 0.08), (-0.3, 0.08)]
X, Y = np.meshgrid((np.arange(WIDE) + 0.5) / WIDE, (np.arange(HIGH) + 0.5) / HIGH)
SYMMETRIC = FLAGS | {
    "tricolour of other colours": bars(GREEN, WHITE, RED, upright=True),
    "tricolour of other order": bars(YELLOW, RED, BLACK),
    "stripes": bars(*[BLUE, WHITE] * 4, BLUE),
    "stripes upright": bars(*[RED, YELLOW] * 6, upright=True),
    "chequers": waves(WHITE, BLACK, (np.floor(X * 8) + np.floor(Y * 6)) % 2),
    "quarters": waves(WHITE, RED, (np.floor(X * 2) + np.floor(Y * 2)) % 2),
    "lozenge": shape(GREEN, YELLOW, [(0, -0.4), (0.55, 0), (0, 0.4), (-0.55, 0)]),
    "wedge": shape(WHITE, BLUE, [(-0.67, -0.5), (0, 0), (-0.67, 0.5)]),
    "square": shape(WHITE, RED, regular(4, math.pi / 4, 0.38)),
    "stop": shape(YELLOW, RED, regular(8, math.pi / 8)),
    "triangle": shape(WHITE, RED, regular(3, math.pi / 2)),
    "triangle upside down": shape(WHITE, RED, regular(3, -math.pi / 2)),
    "arrow": shape(BLUE, WHITE, ARROW),
    "arrow back": shape(BLUE, WHITE, [(-x, y) for x, y in ARROW]),
    "plus": shape(GREEN, WHITE, plus(0.35, 0.1)),
    "gradient": waves(BLACK, WHITE, X),
    "gradient down": waves(BLUE, YELLOW, Y),
    "faint gradient": waves((120, 130, 140), (136, 146, 156), (X + Y) / 2),
    "light in the middle": waves(WHITE, BLUE, np.clip(np.hypot(X - 0.5, Y - 0.5), 0, 1)),
    "waves": waves(RED, WHITE, 0.5 + 0.5 * np.sin(2 * np.pi * 5 * Y)),
    "rings": waves(GREEN, WHITE, 0.5 + 0.5 * np.cos(2 * np.pi * 6 * np.hypot(X - 0.5, Y - 0.5))),
}


def copies(picture: Image.Image) -> dict[str, bytes]:
    """The same picture in other encodings, of lower quality and of other sizes."""
    half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BICUBIC)
    odd = picture.resize((picture.width * 251 // 256, picture.height * 187 // 192), Image.Resampling.BICUBIC)
    return {
        "png": encoded(picture),
        "jpeg 80": encoded(picture, "JPEG", quality=80),
        "webp 80": encoded(picture, "WEBP", quality=80),
        "jpeg 60": encoded(picture, "JPEG", quality=60),
        "half": encoded(half),
        "odd": encoded(odd, "JPEG", quality=80),
    }


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")
