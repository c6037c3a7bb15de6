"""What training is said to take before it begins, against what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.peak import peak_of
from tests.training.synthetic import config, write_shards
from training.config import TrainConfig
from training.footprint import footprint
from training.job import TrainJob

# 4 x 4 patches, CLIP, text and two timesteps; with the sides below.
SIDE, TOKENS = 32, 16 * 16 + 1 + 3 + 2


def publish(folder: str, step: int, metrics: Any) -> None:
    """Keeps nothing."""


def measured(folder: Path, **changes: Any) -> tuple[int, TrainConfig]:
    settings = config(**{"steps": 2, "validation": {"fraction": 0.0}, "checkpoint_every": 100, **changes})
    shards = write_shards(folder / "shards", files=1, side=SIDE)
    return peak_of(TrainJob(settings, shards, str(folder / "work"), publish), folder), settings


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"width": 256, "depth": 6, "heads": 4}},
        pytest.param({"model": {"width": 256, "depth": 6, "heads": 4, "activation_checkpointing": 1}}, marks=pytest.mark.trainer),
        pytest.param({"model": {"width": 256, "depth": 6, "heads": 4, "activation_checkpointing": 2}}, marks=pytest.mark.trainer),
        pytest.param({"model": {"width": 512, "depth": 6, "heads": 8}, "micro_batch": 1}, marks=pytest.mark.trainer),
        pytest.param(
            {"model": {"width": 512, "depth": 6, "heads": 8}, "micro_batch": 1, "zero_stage": 0}, marks=pytest.mark.trainer
        ),
        pytest.param(
            {"model": {"width": 512, "depth": 6, "heads": 8}, "micro_batch": 1, "zero_stage": 2}, marks=pytest.mark.trainer
        ),
        pytest.param(
            {"model": {"width": 512, "depth": 6, "heads": 8}, "micro_batch": 1, "zero_stage": 3}, marks=pytest.mark.trainer
        ),
    ],
)
def test_the_estimate_is_near_what_is_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    took, settings = measured(tmp_path, **changes)
    found = footprint(settings, half=False, tokens=TOKENS)
    print(changes, took / 2**20, found.device / 2**20, found.model / 2**20, found.activations / 2**20)
    assert found.device == pytest.approx(took, rel=0.2)
