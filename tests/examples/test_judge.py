"""The judge and the fifty pictures: what they call right is right, against the scenes that were drawn."""

from __future__ import annotations

import csv
import random
from dataclasses import replace
from pathlib import Path

import pytest

from examples.little_web import naming
from examples.little_web.compose import Scene, all_scenes, caption, render, scene_of
from examples.little_web.judge import PARTS, Judge, agreement

HELD = [scene for scene in all_scenes() if scene.held_out]


def test_the_judge_finds_all_four_of_nearly_all_real_pictures_that_it_never_saw() -> None:
    rng = random.Random(3)
    scenes = [replace(scene, variation=rng.randrange(1, 2**31)) for scene in rng.sample(HELD, 120)]
    seen = Judge.load().read([render(scene, rng.choice((256, 512))) for scene in scenes])
    assert agreement(seen, scenes)["all_four"] >= 0.95


def test_a_caption_says_its_scene_and_anything_else_says_none() -> None:
    rng = random.Random(0)
    assert all(scene_of(caption(scene, rng)) == scene for scene in all_scenes())
    for text in ("", "a large dog", "a large brown dog on the left of a", "a large red on the left of a blue background"):
        assert scene_of(text) is None


def test_agreement_is_of_all_four_only_where_every_part_agrees() -> None:
    scene = Scene("lion", "small", "left", "red")
    other = [replace(scene, **{part: PARTS[part][-1]}) for part in PARTS]
    shares = agreement([scene] * 5, [scene, *other])
    assert shares == {**dict.fromkeys(PARTS, 0.8), "all_four": 0.2}


def test_the_fifty_are_held_out_and_the_same_each_time() -> None:
    first, again = naming.chosen(), naming.chosen()
    assert first == again and len({scene for scene, _ in first}) == naming.COUNT
    assert all(scene.held_out and scene_of(text) == scene for scene, text in first)


def names(file: Path, scenes: list[Scene]) -> Path:
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(naming.COLUMNS)
        rows.writerows([n, *(getattr(scene, part) for part in PARTS)] for n, scene in enumerate(scenes, 1))
    return file


def test_the_lower_of_two_namers_counts(tmp_path: Path) -> None:
    truth = [scene for scene, _ in naming.chosen()]
    names(tmp_path / "captions.csv", truth)
    wrong = [replace(scene, size="large" if scene.size == "small" else "small") for scene in truth[:7]]
    one, two = names(tmp_path / "one.csv", truth), names(tmp_path / "two.csv", [*wrong, *truth[7:]])
    found = naming.score(tmp_path, [one, two])
    assert found["named_of_50"] == 43
    assert found["namers"]["one"]["all_four"] == 50
    assert found["namers"]["two"] == {"drawing": 50, "background": 50, "place": 50, "size": 43, "all_four": 43}


def test_names_that_cannot_be_scored_are_named(tmp_path: Path) -> None:
    truth = [scene for scene, _ in naming.chosen()]
    with pytest.raises(naming.NamesError, match="no row with number 50"):
        naming.read_names(names(tmp_path / "short.csv", truth[:-1]))
    with pytest.raises(naming.NamesError, match="line 2, column drawing: 'dragon' is not one of red apple"):
        naming.read_names(names(tmp_path / "odd.csv", [replace(truth[0], drawing="dragon"), *truth[1:]]))
