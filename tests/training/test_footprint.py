"""What training is said to take before it begins, against what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.peak import peak_of
from tests.training.synthetic import KeepIn, config, write_shards
from training.config import TrainConfig
from training.footprint import fitting, footprint, parameters
from training.job import TrainJob

# 4 x 4 patches, CLIP, text and two timesteps; with the sides below.
SIDE, TOKENS = 32, 16 * 16 + 1 + 3 + 2


def measured(folder: Path, **changes: Any) -> tuple[int, TrainConfig]:
    settings = config(**{"steps": 2, "validation": {"fraction": 0.0}, "checkpoint_every": 100, **changes})
    shards = write_shards(folder / "shards", files=1, side=SIDE)
    return peak_of(TrainJob(settings, shards, str(folder / "work"), KeepIn(str(folder / "kept"))), folder), settings


SMALL, LARGE = ({"width": width, "depth": 6, "heads": 4} for width in (256, 512))
# So that activations take most of it.
MANY = {"global_batch": 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": SMALL, **MANY},
        *(
            pytest.param(changes, marks=pytest.mark.trainer)
            for changes in (
                {"model": {**SMALL, "activation_checkpointing": 1}, **MANY},
                {"model": {**SMALL, "activation_checkpointing": 2}, **MANY},
                {"model": LARGE, "micro_batch": 1, "zero_stage": 0},
                {"model": LARGE, "micro_batch": 1, "zero_stage": 1},
                {"model": LARGE, "micro_batch": 1, "zero_stage": 2},
                {"model": LARGE, "micro_batch": 1, "zero_stage": 3},
            )
        ),
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in {**changes, **changes["model"]}.items() if name != "model"),
)
def test_the_estimate_is_what_is_held_and_at_most_a_third_more(tmp_path: Path, changes: dict[str, Any]) -> None:
    took, settings = measured(tmp_path, **changes)
    assert 0.95 * took < footprint(settings, half=False, tokens=TOKENS).device < 1.33 * took


@pytest.mark.parametrize(
    ("changes", "half", "each", "offloaded", "bucket"),
    [
        ({"zero_stage": 0}, False, 4 + 4 + 12, 0, 0),
        ({"zero_stage": 1, "workers": 2}, False, 4 + 4 + 20 / 2, 0, 4),
        ({"zero_stage": 1, "workers": 4}, True, 2 + 2 + 20 / 4, 0, 2),
        ({"zero_stage": 2, "workers": 4, "zero": {"overlap_comm": True}}, True, 2 + 22 / 4, 0, 4),
        ({"zero_stage": 3, "workers": 4}, True, 24 / 4, 0, 4),
        ({"zero_stage": 1, "workers": 4, "zero": {"offload_optimizer": True, "fp32_reduction": True}}, True, 2 + 2, 20 / 4, 4),
        (
            {"zero_stage": 3, "workers": 4, "zero": {"offload_optimizer": True, "offload_parameters": True}},
            True,
            2 / 4,
            22 / 4,
            4,
        ),
    ],
)
def test_what_a_worker_holds_of_each_number(
    changes: dict[str, Any], half: bool, each: float, offloaded: float, bucket: int
) -> None:
    """By hand: weights, gradients, and 20 bytes of masters, average, two moments and a step's fp32 gradients; buckets."""
    settings = TrainConfig(steps=1, global_batch=8, **changes)
    found, count = footprint(settings, half), parameters(settings.model)
    assert (found.model, found.offloaded, found.activations) == (pytest.approx(each * count), pytest.approx(offloaded * count), 0)
    assert found.buckets == bucket * 500_000_000


def test_auto_takes_the_most_samples_that_have_room_and_says_what_to_change_when_none_has() -> None:
    """The paper's model on a GPU of 80 GB: by hand 1536 x 336 x 2 bytes of 15 x 35 + 16 + 13 activations a sample, in bf16."""
    settings = TrainConfig(steps=1, global_batch=1024, workers=8, micro_batch="auto")
    sample = 1536 * 336 * 2 * (15 * 35 + 16 + 13)
    for have in (80e9, 40e9, 16e9):
        fits = (have - 1.5 * 2**30 - parameters(settings.model) * (4 + 20 / 8) - 1e9) / sample
        found = fitting(settings, True, 336, int(have))
        assert 128 % found == 0 and found <= fits < 2 * found
    with pytest.raises(ValueError, match=r"finds no room: it takes 7.2 GiB .*, a GPU has 7.1; set .*activation_checkpointing: 1"):
        fitting(settings, True, 336, int(8.6 * 2**30))
    with pytest.raises(ValueError, match=r"a GPU has 2.5; raise zero_stage and workers, set zero.offload_optimizer, or lower"):
        fitting(settings, True, 336, 4 * 2**30)
