"""AdamW and Muon in one process: against plain torch, which parameters they take, and through an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.plain import is_muons, start, train_plain
from tests.training.synthetic import KeepIn, config, history, write_shards
from training.begin import Kept
from training.checkpoint import CheckpointError, read_state
from training.config import TrainConfig
from training.job import TrainJob
from training.loop import run
from training.optimizers.adamw import AdamW
from training.optimizers.muon import Muon

CPU = torch.device("cpu")
STATES = {"adamw": ["exp_avg", "exp_avg_sq"], "muon": ["exp_avg", "exp_avg_sq", "momentum_buffer"]}


def muon(iteration: str = "bf16") -> dict:
    return {"kind": "muon", "lr": 5e-3, "iteration": iteration, "rest": {"lr": 5e-3}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def with_muon(alone: None, shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with Muon in fp32 and a checkpoint after each."""
    folder = tmp_path_factory.mktemp("muon")
    run(job(folder, shards, config(optimizer=muon("fp32"), checkpoint_every=1)), CPU)
    return folder


def job(folder: Path, shards: tuple[str, ...], settings: TrainConfig, **more) -> TrainJob:
    return TrainJob(settings, shards, str(folder / "work"), KeepIn(str(folder)), **more)


def train_losses(folder: Path) -> list[float]:
    return [row["loss"] for row in history(folder) if row["kind"] == "train"]


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_adamw_equals_plain_torch(alone: None, shards: tuple[str, ...], tmp_path: Path, zero_stage: int) -> None:
    settings = config(zero_stage=zero_stage)
    run(job(tmp_path, shards, settings), CPU)
    assert train_losses(tmp_path / "6") == pytest.approx(train_plain(shards, settings, "adamw")[0], abs=2e-6)


def test_muon_in_fp32_equals_muon_written_out(with_muon: Path, shards: tuple[str, ...]) -> None:
    plain, first = train_plain(shards, config(optimizer=muon()), "muon-fp32")
    assert train_losses(with_muon / "6") == pytest.approx(plain, abs=1e-5)
    _same_first_update(with_muon, shards, first, 1e-4)


def test_muon_equals_torchs_muon(alone: None, shards: tuple[str, ...], tmp_path: Path) -> None:
    settings = config(optimizer=muon(), zero_stage=0, checkpoint_every=1)
    run(job(tmp_path, shards, settings), CPU)
    plain, first = train_plain(shards, settings, "muon")
    assert train_losses(tmp_path / "6") == pytest.approx(plain, abs=1e-2)
    _same_first_update(tmp_path, shards, first, 1e-3)


def _same_first_update(folder: Path, shards: tuple[str, ...], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    before, after = start(shards, config()).state_dict(), load_file(folder / "1/model.safetensors")
    for name, change in expected.items():
        assert torch.dist(after[name] - before[name], change) <= tolerance * change.norm() + 1e-7


def test_a_checkpoint_names_what_its_optimizer_keeps(with_muon: Path) -> None:
    """Of the matrices of the blocks the momentum alone, of the rest AdamW's moments."""
    weights = load_file(with_muon / "6/model.safetensors")
    matrices = {name for name, tensor in weights.items() if is_muons(name, tensor)}
    assert len(matrices) == 3 * 4 + 1
    assert read_state(with_muon / "6").optimizer == STATES["muon"]
    for kind, names in zip(STATES["muon"], (weights.keys() - matrices, weights.keys() - matrices, matrices), strict=True):
        found = load_file(with_muon / f"6/{kind}.safetensors")
        assert found.keys() == names and all(found[name].shape == weights[name].shape for name in names)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resumed_equals_uninterrupted_and_other_zero_stages_go_on(
    with_muon: Path, shards: tuple[str, ...], tmp_path: Path, kind: str
) -> None:
    chosen = {"optimizer": muon("fp32")} if kind == "muon" else {}
    whole = with_muon
    if kind == "adamw":
        whole = tmp_path / "whole"
        run(job(whole, shards, config(checkpoint_every=3)), CPU)
    run(job(tmp_path / "again", shards, config(**chosen), resume=str(whole / "3")), CPU)
    found, wanted = (history(place / "6") for place in (tmp_path / "again", whole))
    assert [(row["kind"], row["step"]) for row in found] == [(row["kind"], row["step"]) for row in wanted]
    # Without AVX-512 the last bit of a bias's gradient was seen to depend on what the process did before.
    exact = bool(torch.cpu.get_capabilities().get("avx512_f"))
    assert found == wanted if exact else train_losses(tmp_path / "again/6") == pytest.approx(train_losses(whole / "6"), abs=1e-6)
    for tensors in ("model", "ema", *STATES[kind]):
        ours, theirs = (load_file(place / f"6/{tensors}.safetensors") for place in (tmp_path / "again", whole))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)
    run(job(tmp_path / "zero0", shards, config(**chosen, zero_stage=0), resume=str(whole / "3")), CPU)
    run(job(tmp_path / "zero3", shards, config(**chosen, zero_stage=3), resume=str(whole / "3")), CPU)
    for stage in ("zero0", "zero3"):
        assert train_losses(tmp_path / stage / "6") == pytest.approx(train_losses(whole / "6"), abs=1e-5)


def test_another_optimizers_state_is_refused(with_muon: Path, shards: tuple[str, ...], tmp_path: Path) -> None:
    previous = str(with_muon / "6")
    with pytest.raises(
        CheckpointError, match=r"kept exp_avg, exp_avg_sq, momentum_buffer, this run's keeps exp_avg, exp_avg_sq;"
    ):
        run(job(tmp_path, shards, config(), init_from=previous, keep=("weights", "optimizer")), CPU)
    run(job(tmp_path, shards, config(steps=1, optimizer={"lr": 1e-9}), init_from=previous), CPU)
    assert read_state(tmp_path / "1").optimizer == STATES["adamw"]


def test_an_average_is_carried_or_begins_anew(with_muon: Path, shards: tuple[str, ...], tmp_path: Path) -> None:
    """After one update, which is number 6 of an average that goes on (decay 7 / 16), and the first of a new one (1 / 10)."""
    old = {kind: load_file(with_muon / f"6/{kind}.safetensors") for kind in ("model", "ema")}
    keeps: tuple[tuple[tuple[Kept, ...], str, float, int], ...] = (
        (("weights", "ema"), "ema", 7 / 16, 7),
        (("weights",), "model", 1 / 10, 1),
    )
    for keep, kind, decay, updates in keeps:
        folder = tmp_path / "-".join(keep)
        run(job(folder, shards, config(steps=1, optimizer=muon("fp32")), init_from=str(with_muon / "6"), keep=keep), CPU)
        new, average = (load_file(folder / f"1/{name}.safetensors") for name in ("model", "ema"))
        for name, tensor in average.items():
            torch.testing.assert_close(tensor, decay * old[kind][name] + (1 - decay) * new[name], rtol=0, atol=1e-6)
        assert read_state(folder / "1").ema_updates == updates


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_no_step_at_all_keeps_zeros(alone: None, shards: tuple[str, ...], tmp_path: Path, zero_stage: int) -> None:
    run(job(tmp_path, shards, config(steps=0, optimizer=muon(), zero_stage=zero_stage)), CPU)
    for kind in STATES["muon"]:
        assert not any(tensor.any() for tensor in load_file(tmp_path / f"0/{kind}.safetensors").values())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_takes_in_all_or_matrices_alone(shards: tuple[str, ...], kind: str) -> None:
    """With no gradient a step of either shrinks a weight by lr * decay of itself, and does nothing else."""
    for decay in ("all", "matrices"):
        rest = {"lr": 0.1, "weight_decay": 0.5, "decay": decay}
        chosen = AdamW(**rest) if kind == "adamw" else Muon(lr=0.1, weight_decay=0.3, rest=rest)
        model = start(shards, config())
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = chosen.build(model.named_parameters())
        lone = [group for group in optimizer.param_groups if group["state"] != ("momentum_buffer",)]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.param_groups = lone
        optimizer.step()
        for name, parameter in model.named_parameters():
            by_muon = kind == "muon" and is_muons(name, parameter)
            decays = not by_muon and (decay == "all" or (parameter.ndim > 1 and name != "position"))
            torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if decays else 1.0))
