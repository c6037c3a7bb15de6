"""The world of shapes against its truth: whether attributes are right, whether picture and caption agree, and whether the
distributions are the world's.

The report is a page with its figures, the curve of the losses and samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from stages.measuring.history import histories
from stages.measuring.measure import Figure, Measure, Result
from stages.measuring.painters import World
from stages.measuring.samples import Asked, Need, Network, Task

if TYPE_CHECKING:
    from stages.measuring.view import View
    from stages.runner.contract import Output

UNREADABLE = -1
# Task -> what reads its samples back.
READ: dict[Task, tuple[Network, ...]] = {
    "t2i": ("scenes-shown",), "i2t": ("scenes-said",), "joint": ("scenes-shown", "scenes-said"), "i": ("scenes-shown",),
    "t": ("scenes-said",),
}  # fmt: skip
# Figure -> where good is.
FIGURES: dict[str, Literal["lower", "higher"]] = {
    "t2i_accuracy": "higher", "i2t_accuracy": "higher", "joint_consistency": "higher", "image_marginal_tv": "lower",
    "text_marginal_tv": "lower",
}  # fmt: skip


def shown(images: Sequence[Any]) -> np.ndarray:
    """(n, 1): the number of the scene that each picture shows, -1 where it cannot be read."""
    from examples.shapes.pictures import read_picture

    return _numbers([read_picture(np.asarray(image)) for image in images])


def said(captions: Sequence[str]) -> np.ndarray:
    """(n, 1): the number of the scene that each caption says, -1 where it cannot be read."""
    from examples.shapes.world import read_caption

    return _numbers([read_caption(caption) for caption in captions])


def _numbers(scenes: Sequence[Any]) -> np.ndarray:
    from examples.shapes.world import SCENES

    places = {scene: number for number, scene in enumerate(SCENES)}
    return np.array([[UNREADABLE if scene is None else places[scene]] for scene in scenes], np.float32)


class Shapes(Measure):
    """Accuracies and distributions of the world of shapes, of the stage world."""

    kind: Literal["shapes"] = Field("shapes", description="accuracies and distributions of the world of shapes")
    samples: int = Field(20_000, ge=1, description="samples of each task without an input")

    @property
    def of_world(self) -> bool:
        return True

    def needs(self, asked: Asked) -> list[Need]:
        return [
            Need(asked.samples(task), asked.count if task in ("t2i", "i2t") else self.samples, network)
            for task, networks in READ.items()
            for network in networks
        ]

    def result(self, view: View, out: Output) -> Result:
        from examples.shapes.measure import measure
        from examples.shapes.report import figures, page
        from examples.shapes.sheets import curve, sheet

        read: dict[str, list[Any]] = {task: [[], []] for task in READ}
        for need in self.needs(view.asked):
            assert need.samples is not None
            read[need.samples.task][need.network == "scenes-said"] = self._scenes(view.features(need))
        painter = view.painter
        assert isinstance(painter, World)
        artist = painter.artist(view.asked.samples("t2i"))
        artist.protocol = replace(artist.protocol, unconditional=self.samples)
        checkpoint = view.job.inputs["checkpoint"].manifest
        rows = [row for row in histories(view.job).get(checkpoint.node, []) if row["kind"] == "train"]
        found = measure(artist.codec, artist.protocol, {task: tuple(both) for task, both in read.items()})
        values = figures(artist, found, view.job.inputs["codec"].manifest.summary, checkpoint.config, rows)
        out.path("shapes.json", 1).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        out.path("shapes.md").write_text(page(values), encoding="utf-8")
        curve(out.path("shapes-curve.png"), rows)
        sheet(out.path("shapes-samples.png"), artist)
        asked = {name: view.asked.count if name in ("t2i_accuracy", "i2t_accuracy") else self.samples for name in FIGURES}
        return Result([Figure(name, values[name], better, asked[name]) for name, better in FIGURES.items()], found)

    @staticmethod
    def _scenes(numbers: np.ndarray) -> list[Any]:
        from examples.shapes.world import SCENES

        return [None if number == UNREADABLE else SCENES[int(number)] for number in numbers[:, 0]]
