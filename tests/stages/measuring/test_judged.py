"""The measure judge: what is right of pictures of known scenes, before a training and after it."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from examples.little_web.compose import Scene, all_scenes, caption, render
from stages.measuring.judged import Judge, scenes_of
from stages.measuring.samples import Asked, Samples
from stages.runner.contract import StageError

WAY = Samples("t2i", 20, 3.0, "dpm++2m", beams=5)
SCENES = random.Random(5).sample(all_scenes(), 20)


def other(scene: Scene) -> Scene:
    return replace(scene, background="grey" if scene.background == "blue" else "blue")


def test_each_kind_of_sample_is_judged_by_its_own_pictures_or_captions() -> None:
    """After: three backgrounds wrong. Before: all. Written: the last four are no captions. The real pictures are right."""
    rng = random.Random(0)
    captions = [caption(scene, rng) for scene in SCENES]
    after = [*map(other, SCENES[:3]), *SCENES[3:]]
    pictures = {"checkpoint": after, "before": [other(scene) for scene in SCENES], "real": SCENES}

    def images(samples: Samples | None, count: int) -> list[Any]:
        return [render(scene, 256) for scene in pictures["real" if samples is None else samples.of][:count]]

    def said(samples: Samples | None, count: int) -> list[str]:
        return captions if samples is None else [*captions[:16], "", "a dog", "a large", captions[0]]

    view: Any = SimpleNamespace(asked=Asked(20, True, WAY, before=True), images=images, captions=said)
    measure = Judge(before=10)
    found = measure.result(view, out=None)  # type: ignore[arg-type]
    values = {figure.name: (figure.value, figure.samples) for figure in found.figures}
    assert values == {
        "judge_t2i_all_four": (0.85, 20), "judge_t2i_before_all_four": (0.0, 10), "judge_i2t_all_four": (0.8, 20),
        "judge_real_all_four": (1.0, 20),
    }  # fmt: skip
    assert found.details["t2i"] == {"drawing": 1, "background": 0.85, "place": 1, "size": 1, "all_four": 0.85}
    kinds = {(need.samples.task, need.samples.of) if need.samples else None for need in measure.needs(view.asked)}
    assert kinds == {("t2i", "checkpoint"), ("t2i", "before"), ("i2t", "checkpoint"), None}
    assert [need.count for need in Judge(count=5).needs(Asked(20, False, WAY))] == [5]


def test_captions_of_another_world_are_refused() -> None:
    with pytest.raises(StageError, match="judge knows the captions of the demo's little web alone, and not 'a photograph'"):
        scenes_of([caption(SCENES[0], random.Random(0)), "a photograph"])
