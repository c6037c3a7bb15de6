"""A training goes on from what is there, whatever its length and its rhythm of checkpoints say today."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.dataset import verify
from infra.store import Store, StoreError
from stages.runner.contract import Job, StageError
from stages.runner.run import phase_states
from stages.train.stage import Train, TrainStageConfig
from tests.stages.committed import flip
from tests.stages.train.trainings import TENSORS, Trainings, same_tensors
from unidiffuser.uvit import UViT, UViTConfig


def test_a_longer_run_and_another_rhythm_go_on_from_the_newest_checkpoint(
    training: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training(steps=11)
    training(steps=20)
    longest = training(steps=24, checkpoint_every=6)
    assert training.began == [0, 11, 20]
    assert list(training.chain(steps=1).done()) == [5, 10, 11, 15, 20, 24]
    # Fewer steps: the checkpoint of that step, or the greatest before it.
    assert training(steps=15).manifest.summary["step"] == 15 and training.began == [0, 11, 20]
    assert training(steps=13).manifest.summary["step"] == 13 and training.began == [0, 11, 20, 11]

    (tmp_path / "other").mkdir()
    alike = Trainings(tmp_path / "other")
    monkeypatch.setattr("training.launch.train", alike.train)
    assert same_tensors(alike(steps=24, checkpoint_every=100), longest) and alike.began == [0]


def test_what_a_stop_left_is_gone_on_from_and_gives_way_but_datasets_stay(training: Trainings) -> None:
    few: dict[str, Any] = {"keep_every": 10}
    training.stop_at = 7
    with pytest.raises(StageError, match="stopped at step 7 of 12; run again to go on"):
        training(steps=12, **few)
    assert list(training.chain(steps=12).done()) == [7]
    training.stop_at = None
    shorter = training(steps=12, checkpoint_every=4, **few)
    assert list(training.chain(steps=12).done()) == [12]
    training(steps=23, **few)
    assert training.began == [0, 7, 12]
    assert list(training.chain(steps=23).done()) == [12, 20, 23] and verify(shorter) == []
    (state,) = phase_states(training.planned(steps=23, **few), training.store, Train)
    assert {key[-2:] for key in state.keys} == {"20", "23"}, "what only the shorter dataset holds goes with it"


def test_what_a_stop_left_gives_way_where_all_others_stay(training: Trainings) -> None:
    training.stop_at = 7
    with pytest.raises(StageError, match="stopped at step 7"):
        training(steps=11)
    training.stop_at = None
    training(steps=11)
    assert list(training.chain(steps=11).done()) == [5, 10, 11]


def test_a_damaged_checkpoint_is_named_and_without_it_training_goes_on_from_the_one_before(training: Trainings) -> None:
    training(steps=5)
    training(steps=10)
    chain = training.chain(steps=12)
    unit = training.store.url(chain.job.unit_folder(chain.key_of(10)))
    flip(f"{unit}/exp_avg.safetensors", 2000)
    with pytest.raises(StoreError, match=f"^{unit}/exp_avg.safetensors: damaged .*; delete {unit} to go on from the one before$"):
        training(steps=12)
    shutil.rmtree(unit)
    training(steps=12)
    assert training.began == [0, 5, 5]


def test_training_asks_for_room_for_two_checkpoints_of_the_paper() -> None:
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in UViT(UViTConfig()).parameters())
    job = Job(Store("memory://room"), "train", "train-x", TrainStageConfig(steps=1, global_batch=1), {}, {}, {})
    # The weights, their moving average and Adam's two moments, in fp32.
    assert Train.bytes_needed(job) == pytest.approx(2 * len(TENSORS) * 4 * numbers, rel=0.01)
