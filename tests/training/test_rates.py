"""Learning rates against their formulas, and the paper's rule through an interruption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.synthetic import KeepIn, config, history, write_shards
from training.checkpoint import read_state
from training.config import TrainConfig
from training.job import TrainingError, TrainJob
from training.loop import run
from training.rates import Plateau, ScheduleConfig, learning_rate

CPU = torch.device("cpu")


def test_learning_rate_follows_the_formula() -> None:
    plain = ScheduleConfig(warmup_steps=10)
    assert [learning_rate(step, 2.0, plain) for step in (0, 4, 9, 10, 10**6)] == [0.2, 1.0, 2.0, 2.0, 2.0]
    cosine = ScheduleConfig(warmup_steps=10, decay="cosine", decay_steps=110, final_fraction=0.1)
    for step in range(10, 110):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert learning_rate(step, 1.0, cosine) == pytest.approx(expected, abs=1e-12)
    assert learning_rate(500, 1.0, cosine) == pytest.approx(0.1)
    late = ScheduleConfig(warmup_steps=10, decay="linear", decay_start=80, decay_steps=100, final_fraction=0.5)
    rates = [learning_rate(step, 4.0, late) for step in (4, 10, 80, 85, 90, 100, 900)]
    assert rates == pytest.approx([2.0, 4.0, 4.0, 3.5, 3.0, 2.0, 2.0])


def test_plateau_divides_by_ten_after_so_many_looks_without_a_lower_loss() -> None:
    seen, drops = Plateau(), []
    for loss in (1.0, 0.8, 0.9, 0.8, 0.7, 0.7, 0.71, 0.72, 0.73):
        seen.look(loss, patience=2)
        drops.append(seen.drops)
    assert drops == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    schedule = ScheduleConfig(warmup_steps=1, decay="plateau")
    assert [learning_rate(5, 2.0, schedule, drops) for drops in (0, 1, 3)] == [2.0, 0.2, 0.002]


def test_plateau_decides_after_an_interruption_as_without_one(alone: None, tmp_path: Path) -> None:
    """With a learning rate at which the held-out loss rises now and then; stopped between two looks, and validated otherwise."""
    shards = write_shards(tmp_path / "shards")
    rule = {"decay": "plateau", "warmup_steps": 0, "patience": 2, "look_every": 2, "look_samples": 7}

    def settings(validate_every: int) -> TrainConfig:
        validation = {"fraction": 0.2, "every": validate_every, "samples": 11}
        return config(steps=20, schedule=rule, optimizer={"lr": 0.1}, seed=2, gradient_clip=0.0, validation=validation)

    def job(folder: Path, settings: TrainConfig, **more: str) -> TrainJob:
        return TrainJob(settings, shards, str(tmp_path / "work"), KeepIn(str(folder)), **more)

    run(job(tmp_path / "whole", settings(20)), CPU)
    steps = iter(range(1, 21))
    stopped = run(job(tmp_path / "part", settings(20)), CPU, stop_requested=lambda step: next(steps) == 13)
    assert stopped.step == 13
    run(job(tmp_path / "part", settings(7), resume=str(tmp_path / "part/13")), CPU)

    def rates(folder: Path) -> list[float]:
        return [row["lr"] for row in history(folder / "20") if row["kind"] == "train"]

    assert rates(tmp_path / "part") == rates(tmp_path / "whole")
    before, after = (read_state(tmp_path / name).plateau for name in ("part/13", "part/20"))
    assert after == read_state(tmp_path / "whole/20").plateau
    assert before.waited == 1 and before.drops < after.drops
    assert {round(-math.log10(rate)) for rate in rates(tmp_path / "whole")} == {1, 2, 3}
    files = [(tmp_path / name / "20/model.safetensors").read_bytes() for name in ("part", "whole")]
    assert files[0] == files[1]
    # A fork goes on with what was seen if it keeps the schedule, and looks anew if not; step 14 ends with a look.
    found = {}
    for kept in ("schedule", "order"):
        short = settings(20).model_copy(update={"steps": 14})
        more: Any = {"init_from": str(tmp_path / "part/13"), "keep": ("weights", kept)}
        run(job(tmp_path / kept, short, **more), CPU)
        found[kept] = read_state(tmp_path / kept / "14").plateau
    assert found["schedule"] == Plateau(best=before.best, waited=0, drops=before.drops + 1)
    assert found["order"] == Plateau(best=found["order"].best, waited=0, drops=0)


def test_plateau_without_a_held_out_row_is_refused(alone: None, tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "shards", files=1, rows=8)
    settings = config(schedule={"decay": "plateau"}, validation={"fraction": 1e-9})
    with pytest.raises(TrainingError, match="there are none: raise validation.fraction"):
        run(TrainJob(settings, (shard,), str(tmp_path), KeepIn(str(tmp_path))), CPU)
