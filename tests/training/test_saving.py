"""Checkpoints while training goes on: what is written is what was there, and nobody waits for the writing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from tests.training.synthetic import KeepIn, config, history, write_shards
from training.checkpoint import Checkpoint, CheckpointError
from training.history import read_history
from training.job import TrainingError, TrainJob
from training.loop import run
from training.saving import Held, finite
from training.shares import CHUNK, DamagedShare, Shares, merge, share_name
from unidiffuser.weights import read_config

CPU = torch.device("cpu")
SHARE = share_name(0, 1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def whole(alone: None, shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints after 3 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    run(TrainJob(config(), shards, str(folder / "work"), KeepIn(str(folder))), CPU)
    return folder


@dataclass(frozen=True)
class Slow(KeepIn):
    """Writes nothing of step 3 before it is told to."""

    go: Any = None

    @contextmanager
    def writing(self, step: int, name: str) -> Iterator[Any]:
        assert step != 3 or self.go.wait(60)
        with super().writing(step, name) as file:
            yield file


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_of_it(
    whole: Path, shards: tuple[str, ...], tmp_path: Path
) -> None:
    go, rows = threading.Event(), []

    def on_row(row: Any) -> None:
        rows.append(row)
        if row["kind"] == "train" and row["step"] == 5:
            assert not (tmp_path / "3").exists()
            go.set()

    run(TrainJob(config(), shards, str(tmp_path / "work"), Slow(str(tmp_path), None, go)), CPU, on_row=on_row)
    assert go.is_set() and rows[-1]["step"] == 6
    for step in ("3", "6"):
        assert (tmp_path / step / SHARE).read_bytes() == (whole / step / SHARE).read_bytes()
        assert history(tmp_path / step) == history(whole / step)
    assert all(row["checkpoint_wait"] >= 0 for row in read_history(tmp_path / "6/history.jsonl") if row["kind"] == "train")


def test_great_numbers_are_finite_and_one_that_is_not_is_found() -> None:
    numbers = np.full(1000, 1e38, np.float32)
    assert finite(numbers)
    for bad in (np.nan, np.inf, -np.inf):
        numbers[500] = bad
        assert not finite(numbers) and not finite(numbers[500:501])
    assert not finite(np.array([np.inf, -np.inf], np.float32))


def test_what_is_taken_is_what_was_held_whenever_it_is_sealed() -> None:
    for before in range(4):
        tensors = [torch.arange(5.0), torch.arange(CHUNK + 3.0)]  # in three pieces
        expected, asked = [t.clone() for t in tensors], []

        def room(numbers: int, asked: list[int] = asked) -> torch.Tensor:
            asked.append(numbers)
            return torch.empty(numbers)

        held = Held(tensors, room)
        pieces = held.taken()
        found = [next(pieces).clone() for _ in range(before)]
        held.seal()
        for tensor in tensors:
            tensor.fill_(-1)
        found += [piece.clone() for piece in pieces]
        assert torch.equal(torch.cat(found), torch.cat(expected))
        # Only what was not taken is copied.
        assert asked == [sum(map(len, expected)) - sum(map(len, found[:before]))]


def test_a_share_is_a_safetensors_file_of_every_number_once_and_merges_into_whole_tensors(whole: Path) -> None:
    with safe_open(whole / "6" / SHARE, framework="pt") as file:
        keys = set(file.keys())
    shares, model = Shares(whole / "6"), load_file(whole / "6/model.safetensors")
    assert keys == {f"{kind}/{name}@0" for kind in ("model", "ema", "exp_avg", "exp_avg_sq") for name in model}
    assert {name: tensor.shape for name, tensor in model.items()} == shares.shapes
    for name, tensor in model.items():
        assert torch.equal(shares.read("model", name, 1, tensor.numel() - 1), tensor.view(-1)[1:])
    assert merge(whole / "6", "ema", whole / "again").read_bytes() == (whole / "6/ema.safetensors").read_bytes()


def rewritten(source: Path, folder: Path, change: Any) -> Path:
    """A checkpoint whose share holds other numbers; what sampling takes is left out."""
    folder.mkdir()
    for name in ("config.json", "trainer.json", "history.jsonl"):
        (folder / name).write_bytes((source / name).read_bytes())
    with safe_open(source / SHARE, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, folder / SHARE, metadata)
    return folder


def test_shares_that_are_not_every_number_once_are_refused(whole: Path, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["ema/norm.weight@0"] = tensors["ema/norm.weight@0"][:-1].clone()

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        tensors["ema/norm.weight@1"] = tensors.pop("ema/norm.weight@0")

    for name, change, line in (("cut", cut, "ends at 15 of 16"), ("lose", lose, "ema of norm.weight has 1 after 0")):
        with pytest.raises(DamagedShare, match=line):
            Shares(rewritten(whole / "6", tmp_path / name, change))
    (tmp_path / "cut" / SHARE).rename(tmp_path / "cut" / share_name(0, 2))
    with pytest.raises(CheckpointError, match="1 shares are there, and not all"):
        Checkpoint(tmp_path / "cut", read_config(whole / "6"))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_numbers_that_are_not_finite_are_never_kept(
    whole: Path, shards: tuple[str, ...], tmp_path: Path, zero_stage: int
) -> None:
    """The average is no part of the loss, so that nothing but the writing of it can find them."""
    source = rewritten(whole / "3", tmp_path / "bad", lambda tensors: tensors["ema/norm.bias@0"].fill_(torch.inf))
    job = TrainJob(
        config(zero_stage=zero_stage), shards, str(tmp_path / "work"), KeepIn(str(tmp_path / "kept")), resume=str(source)
    )
    with pytest.raises(TrainingError, match=r"^step 6: step 6: .* are not finite, and there is no checkpoint to go back to"):
        run(job, CPU)
    assert KeepIn(str(tmp_path / "kept")).steps() == []


def test_a_share_that_cannot_be_written_ends_the_run_with_its_reason(
    whole: Path, shards: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "kept").write_text("no folder")
    with pytest.raises(TrainingError, match="a checkpoint could not be written: .*kept/3"):
        run(TrainJob(config(), shards, str(tmp_path / "work"), KeepIn(str(tmp_path / "kept"))), CPU)


def test_what_was_fetched_goes_and_what_is_somebodys_own_stays(whole: Path, shards: tuple[str, ...], tmp_path: Path) -> None:
    work = tmp_path / "work"

    def fetch() -> str:
        rewritten(whole / "3", work / "resume", lambda tensors: None)
        return str(work / "resume")

    work.mkdir()
    for name, resume in (("fetched", fetch), ("own", str(whole / "3"))):
        run(TrainJob(config(), shards, str(work), KeepIn(str(tmp_path / name)), resume=resume), CPU)
        assert (tmp_path / name / "6" / SHARE).read_bytes() == (whole / "6" / SHARE).read_bytes()
    assert not (work / "resume").exists() and (whole / "3").exists()
