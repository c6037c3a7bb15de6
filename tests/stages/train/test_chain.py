"""A training goes on from what is there, whatever its length and its rhythm of checkpoints say today."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.dataset import verify
from infra.room import NoRoom
from infra.store import Store, StoreError
from stages.runner.contract import Job, StageError
from stages.runner.run import phase_states
from stages.train.kept import Publisher, kept_at_most
from stages.train.stage import Train, TrainStageConfig
from tests.stages.committed import flip
from tests.stages.train.trainings import SHARE, Trainings, same_tensors
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
    few: dict[str, Any] = {"keep": {"last": 1, "every": 10}}
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


def unit_of(training: Trainings, step: int) -> Path:
    chain = training.chain(steps=12)
    return Path(training.store.url(chain.job.unit_folder(chain.key_of(step))))


@pytest.mark.parametrize("damage", [lambda share: flip(share, 2000), lambda share: shutil.rmtree(share.parent)])
def test_in_place_of_a_damaged_checkpoint_the_one_before_is_taken_and_said(
    training: Trainings, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    whole = training(steps=12)
    training.recipe = "again"
    training.store.remove("train")
    training.store.remove("chains")
    training.stop_at = 11
    with pytest.raises(StageError, match="stopped at step 11"):
        training(steps=12)
    training.stop_at = None
    (share,) = unit_of(training, 11).glob(f"@*/{SHARE}")
    damage(share)
    again = training(steps=12)
    assert training.began == [0, 0, 10] and same_tensors(again, whole)
    assert any("step 11 is damaged, and set aside" in line and "cannot be gone on from" in line for line in caplog.messages)
    assert any("goes on from that of step 10" in line for line in caplog.messages)
    rows = [json.loads(line) for line in again.open(again.file("history.jsonl")).read().splitlines()]
    assert [row["said"] for row in rows if row["kind"] == "damage"] == [
        "the checkpoint of step 11 is damaged: goes on from that of step 10"
    ]
    assert list(training.chain(steps=12).done()) == [5, 10, 12] and (unit_of(training, 11) / "set-aside.json").exists()


def test_where_no_checkpoint_is_whole_none_is_set_aside(training: Trainings) -> None:
    training(steps=5)
    (share,) = unit_of(training, 5).glob(f"@*/{SHARE}")
    flip(share, 2000)
    line = (
        f"^{share}: damaged .*; it cannot be gone on from, and no older checkpoint is whole: begin anew with --force train-256$"
    )
    with pytest.raises(StoreError, match=line):
        training(steps=12)
    assert list(training.chain(steps=12).done()) == [5]


def test_a_checkpoint_for_which_a_machine_has_no_room_is_not_set_aside(
    training: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Trainings(tmp_path / "away", f"memory://{tmp_path.name}")
    monkeypatch.setattr("training.launch.train", away.train)
    away(steps=5)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as small:
        small.setattr("infra.room.shutil.disk_usage", lambda _: usage._replace(free=2**29))
        with pytest.raises(NoRoom, match="are to be fetched to .* of the machine "):
            away(steps=7)
    away(steps=7)
    assert away.began == [0, 5]


def test_a_training_on_an_object_store_is_the_same_and_leaves_one_attempt(
    training: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = training(steps=7)
    away = Trainings(tmp_path / "away", f"memory://{tmp_path.name}")
    monkeypatch.setattr("training.launch.train", away.train)
    away(steps=5)
    dataset = away(steps=7)
    assert away.began == [0, 5] and same_tensors(dataset, local) and verify(dataset) == []
    chain = away.chain(steps=7)
    names = away.store.list(chain.job.unit_folder(chain.key_of(7)))
    assert names[1:] == ["unit.json"] and names[0].startswith("@")


def test_what_a_killed_attempt_has_left_goes_when_it_is_old(training: Trainings, tmp_path: Path) -> None:
    training(steps=5)
    old, new = unit_of(training, 10) / "@dead" / ".x.part", unit_of(training, 10) / "@alive" / ".y.part"
    for path in (old, new):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    training(steps=10)
    assert not old.exists() and new.exists()


@pytest.mark.parametrize(("keep", "left"), [({"last": 2}, [10, 11]), ({"last": 1, "every": 4}, [4, 8, 11]), ({"last": 9}, None)])
def test_the_space_that_is_asked_for_is_what_a_run_takes(
    training: Trainings, keep: dict[str, int], left: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more than stays: the next is written before the last gives way."""
    most = 0

    def give_way(publisher: Publisher, step: int) -> None:
        nonlocal most
        most = max(most, len(publisher.chain.done()))
        whole(publisher, step)

    whole = Publisher.give_way
    monkeypatch.setattr(Publisher, "give_way", give_way)
    settings: dict[str, Any] = {"steps": 11, "checkpoint_every": 2, "keep": keep}
    training(**settings)
    assert list(training.chain(**settings).done()) == (left or [2, 4, 6, 8, 10, 11])
    assert kept_at_most(training.planned(**settings).config) == most


def test_training_asks_for_room_for_what_the_paper_keeps() -> None:
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in UViT(UViTConfig()).parameters())
    config = TrainStageConfig(steps=250_000, global_batch=1024)
    job = Job(Store("memory://room"), "train", "train-x", config, {}, {}, {})
    # The weights, their moving average and Adam's two moments, in fp32; three stay while the next is written.
    assert Train.bytes_needed(job) == pytest.approx(4 * 4 * 4 * numbers, rel=0.01)
