"""Distances of pictures: equal to what other libraries and plain counting give for the same features."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance

from stages.measuring.measure import Result
from stages.measuring.networks import INCEPTION_FILE, network
from stages.measuring.pictures import Cmmd, Fid, Kid, PrecisionRecall, cmmd, fid, kid, precision_recall
from stages.measuring.samples import Asked, Samples
from stages.runner.contract import StageError
from unidiffuser.images import to_pil

WIDTH = 6
ASKED = Asked(40, True, Samples("t2i", 20, 3.0, "dpm++2m"))


class Passing(torch.nn.Module):
    """In place of a network: the features are given."""

    num_features = WIDTH

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.fixture
def features() -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(0)
    drawn = chance.normal(size=(40, WIDTH)) @ chance.normal(size=(WIDTH, WIDTH))
    return drawn.astype(np.float32), chance.normal(0.5, 1.5, size=(40, WIDTH)).astype(np.float32)


def by_torchmetrics(metric: Any, drawn: np.ndarray, real: np.ndarray) -> Any:
    metric.update(torch.from_numpy(drawn), real=False)
    metric.update(torch.from_numpy(real), real=True)
    return metric.compute()


def test_fid_is_that_of_torchmetrics_nothing_for_the_same_and_grows_with_a_shift(features: tuple[np.ndarray, np.ndarray]) -> None:
    drawn, real = features
    assert fid(drawn, real) == pytest.approx(float(by_torchmetrics(FrechetInceptionDistance(feature=Passing()), *features)))
    assert fid(real, real) == pytest.approx(0, abs=1e-6)
    # The covariance stays, so that it is the square of the shift: in all directions, WIDTH times that of one.
    shifts = [fid(real + shift, real) for shift in (0.1, 0.5, 2.0)]
    assert shifts == pytest.approx([WIDTH * 0.01, WIDTH * 0.25, WIDTH * 4.0], rel=1e-4)


def test_kid_is_that_of_torchmetrics_and_its_subsets_follow_from_the_seed(features: tuple[np.ndarray, np.ndarray]) -> None:
    metric = KernelInceptionDistance(feature=Passing(), subsets=1, subset_size=40)
    assert kid(*features, 1, 40, 0)[0] == pytest.approx(float(by_torchmetrics(metric, *features)[0]), rel=1e-5)
    some = kid(*features, 5, 10, 3)
    assert some == kid(*features, 5, 10, 3) and some != kid(*features, 5, 10, 4) and some[1] > 0


def test_cmmd_is_what_its_formula_gives_pair_by_pair(
    features: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in features]

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([np.exp(-np.square(x - y).sum() / (2 * 10.0**2)) for x in a for y in b]))

    expected = 1000 * (mean(unit[0], unit[0]) + mean(unit[1], unit[1]) - 2 * mean(unit[0], unit[1]))
    for rows in (1024, 7):
        monkeypatch.setattr("stages.measuring.pictures.ROWS_AT_ONCE", rows)
        assert cmmd(*features) == pytest.approx(expected, rel=1e-4)
    assert cmmd(features[1] * 3, features[1]) == pytest.approx(0, abs=1e-9), "a length says nothing"


def test_precision_and_recall_are_what_counting_finds(features: tuple[np.ndarray, np.ndarray]) -> None:
    def among(points: np.ndarray, others: np.ndarray, neighbours: int) -> float:
        inside = 0
        for point in points:
            for other in others:
                radius = sorted(np.linalg.norm(others - other, axis=1))[neighbours]
                if np.linalg.norm(point - other) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    drawn, real = features
    for neighbours in (1, 3):
        assert precision_recall(drawn, real, neighbours) == pytest.approx(
            (among(drawn, real, neighbours), among(real, drawn, neighbours))
        )
    # All that is drawn is real, and is but a corner of it.
    assert precision_recall(real[:8], real, 3)[0] == 1 and precision_recall(real[:8], real, 3)[1] < 1


def result(measure: Any, count: int, features: tuple[np.ndarray, np.ndarray], judge: str | None = None) -> Result:
    config = SimpleNamespace(judge=judge, clip="embedded", seed=0)
    view: Any = SimpleNamespace(asked=Asked(count, True, ASKED.way), job=SimpleNamespace(config=config))
    view.features = lambda need: features[need.samples is None][: need.count]
    return measure.result(view, None)


def test_too_few_samples_are_said_beside_the_figure(features: tuple[np.ndarray, np.ndarray]) -> None:
    (figure,) = result(Fid(), 40, features).figures
    assert (figure.name, figure.by, figure.samples) == ("fid_clip", "clip embedded", 40)
    assert figure.note == "of fewer than 2,048 samples: not comparable with others"
    many = tuple(np.tile(values, (52, 1)) for values in features)
    assert result(Fid(features="inception"), 2048, many).figures[0].note == ""  # type: ignore[arg-type]
    assert result(Fid(features="inception"), 2048, many).figures[0].name == "fid"  # type: ignore[arg-type]
    (few,) = result(Kid(subset=41), 40, features).figures
    assert few.note == "of fewer than the 41 samples of a subset: of all of them, once"
    assert few.value == pytest.approx(kid(*features, 1, 40, 0)[0], abs=1e-6)
    assert result(Kid(subset=40, subsets=2), 40, features).figures[0].note == ""
    assert "ViT-L-14-336/openai" in result(Cmmd(), 40, features).figures[0].note
    assert result(Cmmd(), 40, features, "ViT-L-14-336/openai").figures[0].note == ""


def test_what_cannot_be_measured_is_refused(features: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(StageError, match="measures: fid compares with real pictures, and prompts has no column image"):
        Fid().needs(Asked(40, False, ASKED.way))
    with pytest.raises(StageError, match="measures: precision-recall has 3 neighbours and 3 pictures; raise count, or lower it"):
        result(PrecisionRecall(), 3, features)


def test_inception_is_torch_fidelitys_by_the_path_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights: the file itself is large, and elsewhere."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        reference = NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False)
    torch.save(reference.state_dict(), place := tmp_path / INCEPTION_FILE)
    job: Any = SimpleNamespace(config=SimpleNamespace(inception=str(place), batch=2))
    pixels = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    found = network("inception", job)(to_pil(pixels))
    assert found.shape == (3, 2048)
    with torch.inference_mode():
        assert np.allclose(found, reference(pixels).numpy(), rtol=1e-3, atol=1e-5)
    place.write_bytes(b"<html>")
    with pytest.raises(StageError, match=f"inception: {place} does not hold those weights .*; take https://.*{INCEPTION_FILE}"):
        network("inception", job)
    place.unlink()
    with pytest.raises(StageError, match=f"inception: {place}: no such file; it is the path of {INCEPTION_FILE}, from https://"):
        network("inception", job)
