"""The filter's `semantic`, against plain cosines."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from infra.store import Store
from stages.filter.meaning import AT_ONCE, HELD_ROWS, PHASES, apart, check_semantic, pieces
from stages.filter.stage import Filter, FilterConfig
from stages.runner.contract import StageError
from tests.stages.filter.test_filter import colour_clip  # noqa: F401
from tests.stages.packed import ColourClip, blots, download, encoded, kept_of, sample


def pictures(count: int) -> list[Image.Image]:
    """Different ones of a few colours, which are all that the stand-in for CLIP sees, of some sizes."""
    chance, found = random.Random(3), []
    for number in range(count):
        side = chance.choice([256, 300, 400])
        tint = np.eye(3)[number % 3] * 120
        pixels = np.asarray(blots(chance, side, side)) * 0.3 + tint
        found.append(Image.fromarray(pixels.astype(np.uint8)))
    return found


def expected(shown: list[Image.Image], least: float) -> list[int]:
    """From the largest on, each that is not too like one that stays."""
    seen = ColourClip().image(shown).numpy().astype(np.float16).astype(np.float64)
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    stays: list[int] = []
    for row in sorted(range(len(shown)), key=lambda row: (-shown[row].width, row)):
        if all(seen[row] @ seen[other] < least for other in stays):
            stays.append(row)
    return sorted(stays)


@pytest.mark.parametrize("clusters", [1, 3])
def test_of_pictures_that_mean_the_same_the_largest_stays(tmp_path, make, in_process, digests, monkeypatch, clusters):
    """With a cluster a colour too: what is alike in it lies in one. How many rows a worker holds does not show."""
    shown = pictures(24)
    samples = [sample(number, encoded(picture)) for number, picture in enumerate(shown)]
    found = []
    for name, held in (("one", 1000), ("two", 10)):
        monkeypatch.setattr("stages.filter.meaning.HELD_ROWS", held)
        store = Store(str(tmp_path / name))
        rows = download(store, [samples[:10], samples[10:]])
        dataset = make(Filter, store, {"rows": rows}, semantic={"clusters": clusters, "min_cosine": 0.9985})
        found.append(digests(dataset))
    stays = expected(shown, 0.9985)
    assert [int(one.key) for one in kept_of(dataset)] == stays and 5 < len(stays) < 20
    assert dataset.manifest.stats.dropped == {"semantic_duplicate": 24 - len(stays)} and found[0] == found[1]


def test_a_worker_holds_the_embeddings_of_so_many_rows_and_of_no_shard_twice(monkeypatch):
    monkeypatch.setattr("stages.filter.meaning.HELD_ROWS", 10)
    assert [list(piece) for piece in pieces([4, 6, 1, 30, 0, 2, 8])] == [[0, 1], [2], [3], [4, 5, 6]]


def test_what_its_workers_hold_is_told_to_ray():
    config = FilterConfig(semantic={"clusters": 10_000})
    centres, members, meaning = (phase.resources(config).memory for phase in PHASES)
    assert centres >= 2 * 10_000 * 256 * 768 * 4 and members == meaning >= 3 * HELD_ROWS * 768 * 2


def test_rows_are_held_against_those_that_stay_across_pieces():
    chance = np.random.default_rng(0)
    found = chance.standard_normal((3 * AT_ONCE, 3)).astype(np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    stays: list[int] = []
    for row in range(len(found)):
        if not stays or (found[stays] @ found[row]).max() < 0.97:
            stays.append(row)
    assert np.flatnonzero(apart(found, 0.97)).tolist() == stays


def test_what_it_needs_is_said(monkeypatch):
    with pytest.raises(ValidationError, match="semantic needs clip_scores: true and a duplicate_tolerance"):
        FilterConfig(semantic={"clusters": 2}, clip_scores=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"^semantic: faiss is not installed; pip install 'unidiffuser\[semantic\]'$"):
        check_semantic(FilterConfig(semantic={"clusters": 2}))
