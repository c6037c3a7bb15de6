"""The pictures of the world: a renderer with random jitter, and the parser that reads a scene back, or finds it unreadable."""

from __future__ import annotations

import math
from functools import cache

import cv2
import numpy as np

from examples.shapes.world import COUNTS, FORMS, Scene

SIDE = 64
PAPER = np.array((247, 244, 238), dtype=np.float64)
PALETTE = {
    "red": (217, 62, 54),
    "yellow": (244, 204, 40),
    "green": (40, 160, 60),
    "blue": (46, 112, 210),
}
ANCHORS = {"left": (14.0, 32.0), "right": (50.0, 32.0), "top": (32.0, 14.0), "bottom": (32.0, 50.0)}
RADIUS = 9.0
SPACING = 24.0

# Of the jitter, largest values: relative for the radius, pixels for the places, levels for the colours.
RADIUS_JITTER, PLACE_JITTER, SHADE_JITTER, PAPER_JITTER = 0.05, 1.5, 8.0, 3.0

INK_DISTANCE = 100.0  # from the paper, in levels: half of the palest colour's distance
SPECK_AREA, LEAST_AREA = 8, 36
COLOUR_TOLERANCE = 70.0  # below half of the smallest distance within the palette
PLACE_TOLERANCE = 8.0  # pixels; places are 25 apart
TEMPLATE_SIDE, TEMPLATE_AREA = 16, 100.0
FORM_TOLERANCE = 0.2  # root mean square of the coverage


@cache
def _corners(form: str) -> np.ndarray:
    """Corners (n, 2) of a form of radius 1 around the origin; a circle has 40."""
    if form == "square":
        return 0.84 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    points, reach = {"circle": (40, 0.92), "triangle": (3, 1.08)}[form]
    angles = 2 * math.pi * np.arange(points) / points - math.pi / 2
    corners = reach * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return corners + (0, 0.2) if form == "triangle" else corners


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """An anti-aliased picture (64, 64, 3), uint8 RGB: the forms in a row, on the left and right in a column.

    Position, size, shade and paper vary continuously, within the limits above.
    """
    jitter = rng.uniform(-1, 1, 7)
    picture = blank(jitter[0])
    shade = np.array(PALETTE[scene.colour]) + SHADE_JITTER * jitter[1:4]
    radius = RADIUS * (1 + RADIUS_JITTER * jitter[4])
    middle = np.array(ANCHORS[scene.place]) + PLACE_JITTER * jitter[5:7]
    step = np.array((0, SPACING) if scene.place in ("left", "right") else (SPACING, 0))
    for number in range(scene.count):
        paint(picture, scene.form, middle + (number - (scene.count - 1) / 2) * step, radius, shade)
    return picture


def blank(jitter: float) -> np.ndarray:
    """A picture without forms; the paper is darkest at -1 and brightest at 1."""
    picture = np.empty((SIDE, SIDE, 3), np.uint8)
    picture[:] = (PAPER + PAPER_JITTER * jitter).round()
    return picture


def paint(picture: np.ndarray, form: str, place: np.ndarray, radius: float, shade: np.ndarray) -> None:
    """Paint one form, its centre at `place` (x, y), in pixels."""
    # cv2 counts in sixteenths of a pixel, from the middle of the first one.
    corners = ((_corners(form) * radius + place - 0.5) * 16).round().astype(np.int32)
    cv2.fillPoly(picture, [corners], shade.round().tolist(), cv2.LINE_AA, shift=4)


def read_picture(picture: np.ndarray) -> Scene | None:
    """The scene that a picture (64, 64, 3), uint8 RGB, shows; None where it cannot be said.

    Unreadable are: no forms or more than two, forms that differ in colour or kind, a colour that is nobody's, a form that is
    like none, a group that stands between the places, anything that is too large for a speck and too small for a form.
    """
    pixels = picture.astype(np.float64)
    paper, labels, areas, centres = _components(pixels)
    found = [n for n in range(1, len(areas)) if areas[n] >= SPECK_AREA]
    if not 1 <= len(found) <= max(COUNTS) or min(areas[n] for n in found) < LEAST_AREA:
        return None
    kinds = {(_read_colour(pixels[labels == n]), _read_form(pixels, labels == n, centres[n], paper)) for n in found}
    colour, form = kinds.pop()
    place = _read_place(np.mean([centres[n] for n in found], axis=0) + 0.5)
    if kinds or colour is None or form is None or place is None:
        return None
    return Scene(colour, form, place, len(found))


def _read_colour(inside: np.ndarray) -> str | None:
    """The name of the median of pixels (n, 3), which those at the edge do not move."""
    shade = np.median(inside, axis=0)
    distance, name = min((float(np.linalg.norm(shade - value)), name) for name, value in PALETTE.items())
    return name if distance <= COLOUR_TOLERANCE else None


def _read_place(middle: np.ndarray) -> str | None:
    distance, name = min((math.dist(middle, anchor), name) for name, anchor in ANCHORS.items())
    return name if distance <= PLACE_TOLERANCE else None


def _read_form(pixels: np.ndarray, mask: np.ndarray, centre: np.ndarray, paper: np.ndarray) -> str | None:
    """The form whose template is nearest to the coverage of the component, both brought to one size."""
    seen = _coverage(pixels, mask, centre, paper)
    distance, name = min((float(np.sqrt(np.square(seen - template).mean())), form) for form, template in _templates().items())
    return name if distance <= FORM_TOLERANCE else None


def _coverage(pixels: np.ndarray, mask: np.ndarray, centre: np.ndarray, paper: np.ndarray) -> np.ndarray:
    """How much of each pixel of a component is covered, 0 to 1: (16, 16) around its centre, scaled to a fixed covered area."""
    shade = np.median(pixels[mask], axis=0) - paper
    covered = ((pixels - paper) @ shade / (shade @ shade)).clip(0, 1)
    covered *= cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8))
    zoom = math.sqrt(covered.sum() / TEMPLATE_AREA)
    corner = centre - zoom * (TEMPLATE_SIDE - 1) / 2
    window = np.array([[zoom, 0, corner[0]], [0, zoom, corner[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(covered, window, (TEMPLATE_SIDE, TEMPLATE_SIDE), flags=flags)


def _components(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The paper's colour, labels (64, 64) of connected ink, and the area and centre of each label; label 0 is the paper."""
    paper = np.median(pixels.reshape(-1, 3), axis=0)
    ink = (np.linalg.norm(pixels - paper, axis=2) > INK_DISTANCE).astype(np.uint8)
    _, labels, boxes, centres = cv2.connectedComponentsWithStats(ink, connectivity=4)
    return paper, labels, boxes[:, cv2.CC_STAT_AREA], centres


@cache
def _templates() -> dict[str, np.ndarray]:
    """The mean coverage of 50 jittered pictures of each form."""
    templates = {}
    for form in FORMS:
        seen = []
        for seed in range(50):
            pixels = render(Scene("blue", form, "top", 1), np.random.default_rng(seed)).astype(np.float64)
            paper, labels, _, centres = _components(pixels)
            seen.append(_coverage(pixels, labels == 1, centres[1], paper))
        templates[form] = np.mean(seen, axis=0)
    return templates
