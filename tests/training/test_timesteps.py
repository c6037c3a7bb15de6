"""Timesteps as a function of the place: their distribution, and torch's own Sobol sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.synthetic import config, write_shards
from tests.training.test_order import _gather
from training.loader import Loader
from training.timesteps import BITS, timesteps_at


@pytest.mark.parametrize("kind", ["uniform", "sobol"])
def test_a_place_has_its_timesteps_whatever_is_asked_with_it(kind: str) -> None:
    places = np.array([9, 10, 3, 2**30 - 1, 2**30, 2**30 + 1, 5, 4, 10])
    together = timesteps_at(kind, 7, places, 5, 1000)
    assert together.shape == (9, 5) and together.dtype == np.int64
    for place, row in zip(places, together, strict=True):
        assert (timesteps_at(kind, 7, np.array([place]), 5, 1000)[0] == row).all()
    assert (timesteps_at(kind, 8, places, 5, 1000) != together).mean() > 0.9


@pytest.mark.parametrize("kind", ["uniform", "sobol"])
def test_timesteps_are_uniform_and_independent(kind: str) -> None:
    t = timesteps_at(kind, 3, np.arange(2**14), 2, 1000)
    assert (t.min(), t.max()) == (1, 1000)
    assert t.mean(0) == pytest.approx([500.5, 500.5], abs=10)
    assert abs(np.corrcoef(t.T)[0, 1]) < 0.03
    assert len({tuple(row) for row in t.tolist()}) > 0.98 * len(t)


def test_sobol_gives_every_stretch_its_share_of_every_combination() -> None:
    """Of 256 places in a row, one in each cell of a 16 x 16 grid, and so in each other grid of 256 cells; of random ones, 63%."""
    for start in (0, 256 * 41, 2**30 + 512):
        t = timesteps_at("sobol", 3, np.arange(start, start + 256), 2, 2**12) - 1
        for rows in (1, 16, 64):
            cells = t[:, 0] * rows // 2**12 * 256 + t[:, 1] * (256 // rows) // 2**12
            assert len(set(cells.tolist())) == 256


def test_sobol_is_torchs_sequence() -> None:
    (mixed,) = np.random.SeedSequence([5, 0]).generate_state(1, np.uint64)
    engine = torch.quasirandom.SobolEngine(3, scramble=True, seed=int(mixed >> np.uint64(1)))
    theirs = engine.draw(3000, dtype=torch.float64).numpy()
    ours = timesteps_at("sobol", 5, np.arange(3000), 3, 2**BITS) - 1
    assert np.abs(ours / 2**BITS - theirs).max() < 1e-7  # torch rounds to fp32 on the way


@pytest.mark.parametrize("kind", ["uniform", "sobol"])
def test_batches_have_the_timesteps_of_their_places_for_any_number_of_workers(kind: str, tmp_path: Path) -> None:
    shards, settings = write_shards(tmp_path), config(timesteps=kind)
    expected = timesteps_at(kind, settings.seed, np.arange(24, 32), 2, 1000)
    gather = _gather(settings, shards, 2)
    for loaders in ([Loader(settings, shards)], [Loader(settings, shards, rank, 2, gather) for rank in range(2)]):
        batches = [loader.batch(3) for loader in loaders]
        found = torch.stack([torch.cat([batch.timesteps[name] for batch in batches]) for name in ("image", "text")], 1)
        assert (found.numpy() == expected).all()
