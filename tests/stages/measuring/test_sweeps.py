"""Sweeps and robustness: which samples they ask for, what they make of them, and what damage does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from stages.measuring.damage import CAPTIONS, PICTURES, damaged
from stages.measuring.robustness import Robustness
from stages.measuring.samples import Asked, Need, Samples
from stages.measuring.scores import total_variation
from stages.measuring.sweeps import Guidance, Samplers

WAY = Samples("t2i", steps=20, guidance=3.0, sampler="dpm++2m", beams=5)
ASKED = Asked(40, True, WAY)


class Seen:
    """Stands in for a view: features of 4 numbers that belong to the samples and the network alone."""

    asked = ASKED
    job = SimpleNamespace(config=SimpleNamespace(judge="some-clip", clip="embedded"))

    def features(self, need: Need) -> np.ndarray:
        told = f"{need.samples} {need.network}"
        rng = np.random.default_rng(sum(ord(letter) * place for place, letter in enumerate(told)))
        return rng.normal(1.0, size=(need.count, 4)).astype(np.float32)


class Written:
    """Stands in for an output: files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, rows: int = 0) -> Path:
        return self.folder / name


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    each = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return max(0.0, 100 * float(each.mean()))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Written out with the roots of the eigenvalues of the product."""
    product = np.cov(a.T) @ np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * roots)


def test_a_sweep_of_guidance_scores_every_scale_both_ways(tmp_path: Path) -> None:
    measure = Guidance(scales=(0.0, 3.0, 7.0), count=30)
    asked = {need.samples for need in measure.needs(ASKED) if need.samples}
    assert {(samples.task, samples.guidance) for samples in asked} == {(t, s) for t in ("t2i", "i2t") for s in (0, 3, 7)}
    assert {samples.beams for samples in asked if samples.task == "i2t"} == {5}

    found = measure.result(Seen(), Written(tmp_path))  # type: ignore[arg-type]
    points: list[Mapping[str, Any]] = found.details["points"]
    assert [point["guidance"] for point in points] == [0, 3, 7]
    for point in points:
        drawn, written = (
            Samples(task, 20, point["guidance"], "dpm++2m", beams) for task, beams in (("t2i", 1), ("i2t", 5))
        )  # fmt: skip
        seen, real = Seen().features(Need(drawn, 30, "clip-image")), Seen().features(Need(None, 30, "clip-image"))
        said, asked_for = (Seen().features(Need(samples, 30, "clip-text")) for samples in (written, None))
        assert point["values"]["fid_clip"] == pytest.approx(frechet(seen, real), rel=1e-4)
        assert point["values"]["clip_score_t2i"] == pytest.approx(cosine(seen, asked_for), rel=1e-4)
        assert point["values"]["clip_score_i2t"] == pytest.approx(cosine(real, said), rel=1e-4)
    best = {figure.name: (figure.value, figure.note) for figure in found.figures}
    lowest = min(points, key=lambda point: point["values"]["fid_clip"])
    note = f"guidance {lowest['guidance']}; of fewer than 2,048 samples: not comparable with others"
    assert best["guidance_best_fid_clip"] == (lowest["values"]["fid_clip"], note)
    assert best["guidance_best_clip_score_t2i"][1].startswith("guidance ") and ";" not in best["guidance_best_clip_score_t2i"][1]
    assert (tmp_path / "guidance.md").read_text().count("\n| ") == 4 and (tmp_path / "guidance.png").stat().st_size > 5000


def test_text_alone_has_no_way_back_and_no_distance() -> None:
    texts = Asked(40, False, WAY)
    assert {need.samples.task for need in Samplers().needs(texts) if need.samples} == {"t2i"}
    assert {score.name for score in Samplers().scores(Samplers().points(texts)[0], texts)} == {"clip_score_t2i"}


def test_a_sweep_of_samplers_has_every_sampler_with_every_number_of_steps() -> None:
    found = {(need.samples.sampler, need.samples.steps) for need in Samplers().needs(ASKED) if need.samples}
    assert len(found) == 7 * 5 and ("analytic-dpm", 5) in found and ("era", 50) in found


def test_robustness_noises_what_is_given_and_damages_it_one_way_at_a_time(tmp_path: Path) -> None:
    found = {
        (need.samples.task, need.samples.condition_t, need.samples.damage)
        for need in Robustness(noise=(0, 500)).needs(ASKED)
        if need.samples
    }
    noised = {(task, t, "") for task in ("t2i", "i2t") for t in (0, 500)}
    assert found == noised | {("t2i", 0, name) for name in CAPTIONS} | {("i2t", 0, name) for name in PICTURES}
    result = Robustness().result(Seen(), Written(tmp_path))  # type: ignore[arg-type]
    notes = {figure.name: figure.note for figure in result.figures}
    assert notes["clip_score_i2t_jpeg_10"] == ""
    assert notes["fid_clip_words_dropped"] == "of fewer than 2,048 samples: not comparable with others"
    assert (tmp_path / "robustness.png").stat().st_size > 5000


def test_total_variation_of_scenes() -> None:
    from examples.shapes.world import SCENES, joint

    truth = joint().ravel()
    once = total_variation(np.zeros((10, 1), np.float32))  # all show the first scene
    assert once == pytest.approx(1 - truth[0])
    assert total_variation(np.full((10, 1), -1, np.float32)) == 1
    true = np.repeat(np.arange(len(SCENES)), np.round(truth * 100_000).astype(int))[:, None]
    assert total_variation(true.astype(np.float32)) < 1e-3


@pytest.mark.parametrize("name", PICTURES)
def test_a_damaged_picture_is_another_of_its_size_and_the_same_each_time(name: str) -> None:
    ramp = Image.linear_gradient("L")
    picture = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180))).resize((60, 40))
    before = picture.tobytes()
    one, two = damaged(name, [picture, picture], 3)
    assert picture.tobytes() == before and one.size == picture.size and one.mode == "RGB"
    assert damaged(name, [picture], 4)[0].tobytes() == two.tobytes()
    assert ImageChops.difference(one, picture).getbbox() is not None
    if name == "masked":
        covered = (np.asarray(one) == 127).all(axis=2).sum()
        assert covered >= 30 * 20 and one.tobytes() != two.tobytes()
    assert damaged("", [picture], 0)[0] is picture


def test_damaged_captions_lose_words_or_their_order() -> None:
    caption = "two small red squares on the left"
    dropped, swapped = (damaged(name, [caption] * 200, 0) for name in ("words-dropped", "words-swapped"))
    left = [len(text.split()) for text in dropped]
    assert 1 <= min(left) and 0.6 < sum(left) / (200 * 7) < 0.8
    assert all(set(text.split()) <= set(caption.split()) for text in dropped)
    assert all(sorted(text.split()) == sorted(caption.split()) and text != caption for text in swapped)
    assert damaged("words-dropped", ["red"] * 20, 0) == ["red"] * 20 == damaged("words-swapped", ["red"] * 20, 0)
