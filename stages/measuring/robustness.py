"""Robustness: how good samples still are when what is given is noised, damaged, or of another domain.

What is drawn or written is compared with what was given as it was before. At noise of the last timestep nothing is known of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stages.measuring.damage import CAPTIONS, PICTURES
from stages.measuring.measure import Figure
from stages.measuring.samples import Asked
from stages.measuring.scores import Score
from stages.measuring.sweep_pages import robustness_curves
from stages.measuring.sweeps import Point, Sweep

if TYPE_CHECKING:
    from stages.measuring.view import View
    from stages.runner.contract import Output

PictureDamage = Literal["masked", "jpeg-10", "blurred", "grey", "outlines", "negative"]
CaptionDamage = Literal["words-dropped", "words-swapped"]


class Robustness(Sweep):
    """Scores by the timestep of the noise on the condition, and by what has happened to it."""

    kind: Literal["robustness"] = Field(
        "robustness", description="quality against noise on what is given, and against its damage"
    )
    noise: tuple[Annotated[int, Field(ge=0, le=1000)], ...] = Field(
        tuple(range(0, 1001, 100)), min_length=1, description="timesteps of the noise on what is given, 0 to 1000"
    )
    pictures: tuple[PictureDamage, ...] = Field(tuple(PICTURES), description="what happens to given pictures")  # type: ignore[arg-type]
    captions: tuple[CaptionDamage, ...] = Field(tuple(CAPTIONS), description="what happens to given captions")  # type: ignore[arg-type]

    def points(self, asked: Asked) -> list[Point]:
        ways = [asked.samples(task) for task in self.tasks(asked) if task != "i"]
        found = [Point({"noise": t}, tuple(replace(way, condition_t=t) for way in ways)) for t in self.noise]
        for way, names in zip(ways, (self.captions, self.pictures), strict=False):
            found += [Point({"damage": name}, (replace(way, damage=name),)) for name in names]
        return found

    def figures(self, points: Sequence[Mapping[str, Any]], scored: Mapping[str, Score], view: View) -> Iterable[Figure]:
        """Every score under every damage."""
        for point in points:
            if "damage" in point:
                for name, value in point["values"].items():
                    told, score = f"{name}_{point['damage']}".replace("-", "_"), scored[name]
                    yield Figure(told, value, score.better, score.needs[0].count, self.seen_by(view), score.note)

    def draw(self, points: Sequence[Mapping[str, Any]], names: Sequence[str], out: Output) -> None:
        robustness_curves(out.path("robustness.png"), points, names)
