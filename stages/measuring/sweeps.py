"""Sweeps: how good samples are by guidance, and by sampler and number of steps.

A sweep writes a page, `KIND.md`, with its curves, `KIND.png`; what it found is in the report too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field

from stages.measuring.measure import DIGITS, Figure, Measure, Result
from stages.measuring.networks import judge_of
from stages.measuring.pictures import FID_SAMPLES
from stages.measuring.samples import Asked, Need, SamplerName, Samples, Task
from stages.measuring.scores import Features, Score, scores_of
from stages.measuring.sweep_pages import guidance_curves, page, sampler_curves

if TYPE_CHECKING:
    from stages.measuring.view import View
    from stages.runner.contract import Output

ALL_SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)


@dataclass(frozen=True)
class Point:
    """One place of a sweep: what it is called, and the samples that are scored there."""

    setting: Mapping[str, Any]
    ways: tuple[Samples, ...]


class Sweep(Measure):
    """Base of the sweeps: scores at every point."""

    features: Features = Field(
        "clip", description="what scores: clip, or inception for FID, or scenes, which reads the pictures of the world of shapes"
    )
    count: int | None = Field(None, ge=2, description="samples of a point; as many as the evaluation has captions when not given")

    @property
    def of_world(self) -> bool:
        return self.features == "scenes"

    def points(self, asked: Asked) -> list[Point]:
        raise NotImplementedError

    def draw(self, points: Sequence[Mapping[str, Any]], names: Sequence[str], out: Output) -> None:
        """Draw the curves into `out`."""
        raise NotImplementedError

    def tasks(self, asked: Asked) -> tuple[Task, ...]:
        """Text to image, image to text where there are pictures, and image only of a world whose distribution is known."""
        return ("t2i", *(("i2t",) if asked.pictures else ()), *(("i",) if self.features == "scenes" else ()))  # type: ignore[return-value]

    def scores(self, point: Point, asked: Asked) -> list[Score]:
        return [score for way in point.ways for score in scores_of(way, asked, self.features, self.counted(way, asked))]

    def counted(self, way: Samples, asked: Asked) -> int:
        """How many of these samples a point has."""
        return min(self.count or asked.count, asked.count)

    def needs(self, asked: Asked) -> list[Need]:
        return [need for point in self.points(asked) for score in self.scores(point, asked) for need in score.needs]

    def result(self, view: View, out: Output) -> Result:
        asked, points = view.asked, []
        scored: dict[str, Score] = {}
        for point in self.points(asked):
            scores = self.scores(point, asked)
            scored |= {score.name: score for score in scores}
            points.append({**point.setting, "values": {score.name: round(score.value(view), DIGITS) for score in scores}})
        about, names = self.about(view), list(scored)
        out.path(f"{self.kind}.md", 1).write_text(page(self.kind, points, names, about), encoding="utf-8")
        self.draw(points, names, out)
        return Result(list(self.figures(points, scored, view)), {"points": points, "figures": names, "about": about})

    def figures(self, points: Sequence[Mapping[str, Any]], scored: Mapping[str, Score], view: View) -> Iterable[Figure]:
        """The best of every score, with where it is."""
        for name, score in scored.items():
            having = [point for point in points if name in point["values"]]
            best = (min if score.better == "lower" else max)(having, key=lambda point: point["values"][name])
            where = ", ".join(f"{key} {value}" for key, value in best.items() if key != "values")
            told, note = f"{self.kind}_best_{name}", "; ".join(filter(None, (where, score.note)))
            yield Figure(told, best["values"][name], score.better, score.needs[0].count, self.seen_by(view), note)

    def seen_by(self, view: View) -> str:
        if self.features == "scenes":
            return "the world's own parsers"
        judge = f"clip {judge_of(view.job.config)}"
        return f"{judge}, inception-v3 of torch-fidelity" if self.features == "inception" else judge

    def about(self, view: View) -> str:
        """What was measured, in a sentence or two."""
        count, way = min(self.count or view.asked.count, view.asked.count), view.asked.way
        told = (
            f"{count:,} samples a point, seen by {self.seen_by(view)}. Where the table does not say otherwise: "
            f"{way.steps} steps of {way.sampler}, guidance {way.guidance:g}."
        )
        if self.features != "scenes" and count < FID_SAMPLES:
            told += f" FID of fewer than {FID_SAMPLES:,} pictures is too high, for all points alike: compare within this page."
        return told


class Guidance(Sweep):
    """Guidance scale against distance from real pictures and agreement with the condition, both ways."""

    kind: Literal["guidance"] = Field("guidance", description="guidance scale against FID and CLIP score, both ways")
    scales: tuple[Annotated[float, Field(ge=0, le=100)], ...] = Field(
        (0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0), min_length=1, description="guidance scales"
    )

    def points(self, asked: Asked) -> list[Point]:
        tasks = [task for task in self.tasks(asked) if task != "i"]  # nothing is given there, so nothing guides
        return [
            Point({"guidance": scale}, tuple(replace(asked.samples(task), guidance=scale) for task in tasks))
            for scale in self.scales
        ]

    def draw(self, points: Sequence[Mapping[str, Any]], names: Sequence[str], out: Output) -> None:
        guidance_curves(out.path("guidance.png"), points, names)


class Samplers(Sweep):
    """Every sampler with several numbers of steps."""

    kind: Literal["samplers"] = Field(
        "samplers", description="samplers and numbers of steps against FID and CLIP score, both ways"
    )
    samplers: tuple[SamplerName, ...] = Field(ALL_SAMPLERS, min_length=1, description="samplers' names")
    steps: tuple[Annotated[int, Field(ge=1, le=999)], ...] = Field(
        (5, 10, 20, 25, 50), min_length=1, description="network calls a sample"
    )
    samples: int = Field(
        2000, ge=2, description="of scenes: samples of image only, whose distribution is compared with the truth"
    )

    def counted(self, way: Samples, asked: Asked) -> int:
        return self.samples if way.task == "i" else super().counted(way, asked)

    def about(self, view: View) -> str:
        return super().about(view) + (f" Total variation is of {self.samples:,} samples." if self.features == "scenes" else "")

    def points(self, asked: Asked) -> list[Point]:
        return [
            Point(
                {"sampler": name, "steps": steps},
                tuple(replace(asked.samples(task), sampler=name, steps=steps) for task in self.tasks(asked)),
            )
            for name in self.samplers
            for steps in self.steps
        ]

    def draw(self, points: Sequence[Mapping[str, Any]], names: Sequence[str], out: Output) -> None:
        sampler_curves(out.path("samplers.png"), points, names)
