"""The world: scenes with four attributes that depend on each other, and captions with an exact parser.

The joint distribution is chosen, skewed, and no product of its marginals:

    p(colour, form, place, count) = p(colour) p(form | colour) p(place | form) p(count | colour)

A network that learned the single attributes but not how they go together is therefore found out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

COLOURS = ("red", "yellow", "green", "blue")
FORMS = ("circle", "square", "triangle")
PLACES = ("left", "right", "top", "bottom")
COUNTS = (1, 2)

COLOUR = (0.40, 0.30, 0.20, 0.10)
FORM_GIVEN_COLOUR = (
    (0.70, 0.20, 0.10),
    (0.10, 0.15, 0.75),
    (0.20, 0.70, 0.10),
    (0.45, 0.10, 0.45),
)
PLACE_GIVEN_FORM = (
    (0.10, 0.15, 0.20, 0.55),
    (0.55, 0.20, 0.10, 0.15),
    (0.10, 0.20, 0.60, 0.10),
)
COUNT_GIVEN_COLOUR = (
    (0.75, 0.25),
    (0.20, 0.80),
    (0.50, 0.50),
    (0.30, 0.70),
)


class Scene(NamedTuple):
    """What a picture shows and a caption says: so many forms of one colour, and where they stand."""

    colour: str
    form: str
    place: str
    count: int  # type: ignore[assignment]  # hides the method of tuples


VALUES: dict[str, tuple] = {"colour": COLOURS, "form": FORMS, "place": PLACES, "count": COUNTS}
SCENES = tuple(Scene(*values) for values in product(*VALUES.values()))


def joint() -> np.ndarray:
    """Probabilities (4, 3, 4, 2) of colour, form, place and count; flattened, they are those of `SCENES`."""
    return np.einsum("c,cf,fp,cn->cfpn", COLOUR, FORM_GIVEN_COLOUR, PLACE_GIVEN_FORM, COUNT_GIVEN_COLOUR)


def draw(rng: np.random.Generator, count: int) -> list[Scene]:
    """Scenes drawn from the joint distribution."""
    return [SCENES[index] for index in rng.choice(len(SCENES), size=count, p=joint().ravel())]


def scene_at(point: float) -> Scene:
    """The scene at a number in 0 .. 1, of which each has its probability as a stretch."""
    return SCENES[int(np.searchsorted(_ENDS, point, side="right"))]


_ENDS = joint().ravel().cumsum()[:-1]

NUMBERS = {1: "one", 2: "two"}
WHERE = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
PHRASINGS = ("{number} {colour} {things} {where}", "{where} {number} {colour} {things}", "{number} {things} {where} in {colour}")


def caption(scene: Scene, point: float) -> str:
    """One of the ways to say it, by a number in 0 .. 1.

    >>> [caption(Scene("red", "square", "left", 2), point) for point in (0.1, 0.5, 0.9)]
    ['two red squares on the left', 'on the left two red squares', 'two squares on the left in red']
    """
    things = scene.form if scene.count == 1 else scene.form + "s"
    return PHRASINGS[int(len(PHRASINGS) * point)].format(
        number=NUMBERS[scene.count], colour=scene.colour, things=things, where=WHERE[scene.place]
    )


def all_captions() -> Iterator[tuple[str, Scene]]:
    """Every caption that the grammar has, with its scene."""
    for scene in SCENES:
        for phrasing in range(len(PHRASINGS)):
            yield caption(scene, (phrasing + 0.5) / len(PHRASINGS)), scene


@lru_cache(maxsize=1)
def _scene_of_caption() -> dict[str, Scene]:
    return dict(all_captions())


def read_caption(text: str) -> Scene | None:
    """The scene that a caption describes; None unless the grammar has exactly this caption, plural and preposition included."""
    return _scene_of_caption().get(text)


def draw_captions(scenes: list[Scene], rng: np.random.Generator) -> list[str]:
    """A caption for each scene, its phrasing drawn uniformly."""
    return [caption(scene, point) for scene, point in zip(scenes, rng.random(len(scenes)), strict=True)]
