"""The loop in one process: against plain torch, against the formulas, and against itself when interrupted."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.plain import WEIGHTS, loss_of, losses_of, start
from tests.training.synthetic import KeepIn, config, history, losses, write_shards
from training.begin import ALL, Kept
from training.checkpoint import CheckpointError, read_state
from training.config import TrainConfig
from training.job import TrainingError, TrainJob
from training.loader import Loader
from training.loop import run
from training.optimizers.adamw import AdamW
from unidiffuser.weights import load_native

CPU = torch.device("cpu")


def job(folder: Path, shards: tuple[str, ...], settings: TrainConfig, **more) -> TrainJob:
    return TrainJob(settings, shards, str(folder / "work"), KeepIn(str(folder)), **more)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def every_step(alone: None, shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("every-step")
    run(job(folder, shards, config(checkpoint_every=1)), CPU)
    return folder


def test_losses_and_weights_equal_plain_torch(every_step: Path, shards: tuple[str, ...]) -> None:
    settings = config()
    model, loader = start(shards, settings), Loader(settings, shards)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.9), weight_decay=0.03)
    told = [row for row in history(every_step / "6") if row["kind"] == "train"]
    for step in range(6):
        optimizer.param_groups[0]["lr"] = min(1.0, (step + 1) / 2) * 5e-3
        loss = loss_of(model, loader.batch(step))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert told[step]["loss"] == pytest.approx(loss.item(), abs=2e-6)
        assert told[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert told[step]["lr"] == optimizer.param_groups[0]["lr"]
    trained = load_native(every_step / "6").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=2e-5)


def test_machines_that_fetched_different_steps_do_not_train_together(
    every_step: Path, shards: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.fetching.gathered", lambda found: [found, [3]])
    with pytest.raises(
        TrainingError, match="^machines begin from the checkpoints of steps 3 and 4, as one .* damaged; run again$"
    ):
        run(job(tmp_path, shards, config(), resume=str(every_step / "4")), CPU)


def test_each_part_has_its_weight_and_its_loss_is_reported(
    alone: None, every_step: Path, shards: tuple[str, ...], tmp_path: Path
) -> None:
    weights = {"latent": 1.0, "clip": 3.0, "text": 0.0}
    settings = config(objective={"part_weights": weights, "min_snr_gamma": 2.0})
    run(job(tmp_path, shards, settings), CPU)
    model, batch = start(shards, settings), Loader(settings, shards).batch(0)
    for folder, shares, gamma in ((every_step / "6", WEIGHTS, math.inf), (tmp_path / "6", weights, 2.0)):
        told = next(row for row in history(folder) if row["kind"] == "train")
        expected = {part: mse.item() for part, mse in losses_of(model, batch, gamma).items()}
        for part, mse in expected.items():
            assert told[f"loss_{part}"] == pytest.approx(mse, abs=2e-6)
        mean = sum(shares[part] * mse for part, mse in expected.items()) / sum(shares.values())
        assert told["loss"] == pytest.approx(mean, abs=2e-6)


def test_losses_by_modality_and_by_eighths_of_its_timesteps(every_step: Path, shards: tuple[str, ...]) -> None:
    """Sample by sample, by hand; an eighth in which no sample is has no loss."""
    model, batch = start(shards, config()), Loader(config(), shards).batch(0)
    told = next(row for row in history(every_step / "6") if row["kind"] == "train")
    found: dict[str, list[float]] = {}
    for sample in batch.split(1):
        parts = {part: mse.item() for part, mse in losses_of(model, sample).items()}
        losses = {"image": (0.75 * parts["latent"] + 0.02 * parts["clip"]) / 0.77, "text": parts["text"]}
        for modality, loss in losses.items():
            eighth = next(n for n in range(1, 9) if sample.timesteps[modality].item() <= n * 125)
            for name in (f"loss_{modality}", f"loss_{modality}_t{eighth}"):
                found.setdefault(name, []).append(loss)
    assert {name for name in told if "_t" in name and name[-1].isdigit()} == {name for name in found if name[-1].isdigit()}
    for name, several in found.items():
        assert told[name] == pytest.approx(sum(several) / len(several), abs=2e-6)


def test_validation_is_with_the_weights_as_trained_and_with_their_average(
    alone: None, every_step: Path, shards: tuple[str, ...], tmp_path: Path
) -> None:
    held = Loader(config(), shards).validation()
    told = {row["step"]: row for row in history(every_step / "6") if row["kind"] == "validation"}
    assert held is not None and list(told) == [0, 3, 6]
    model = start(shards, config())
    for step, prefix, name in ((3, "", "model"), (3, "ema_", "ema"), (6, "", "model"), (6, "ema_", "ema")):
        model.load_state_dict(load_file(every_step / str(step) / f"{name}.safetensors"))
        assert told[step][f"{prefix}loss"] == pytest.approx(loss_of(model, held).item(), abs=2e-6)
    assert told[0]["ema_loss"] == told[0]["loss"] and told[6]["ema_loss"] != told[6]["loss"]
    # Looking changes nothing.
    run(job(tmp_path, shards, config(validation={"fraction": 0.2, "every": 100, "samples": 11})), CPU)
    for name in ("model", "ema", "exp_avg", "exp_avg_sq"):
        assert (tmp_path / f"6/{name}.safetensors").read_bytes() == (every_step / f"6/{name}.safetensors").read_bytes()


def test_moving_average_follows_the_formula(every_step: Path, shards: tuple[str, ...]) -> None:
    average = {name: tensor.double() for name, tensor in start(shards, config()).state_dict().items()}
    for step in range(1, 7):
        weights = load_file(every_step / str(step) / "model.safetensors")
        decay = min(0.9999, step / (9 + step))  # (1 + n) / (10 + n) with n = step - 1 updates before
        average = {name: decay * old + (1 - decay) * weights[name].double() for name, old in average.items()}
        saved = load_file(every_step / str(step) / "ema.safetensors")
        for name, expected in average.items():
            torch.testing.assert_close(saved[name].double(), expected, rtol=0, atol=1e-6)


def test_interrupted_and_resumed_equals_uninterrupted(alone: None, shards: tuple[str, ...], tmp_path: Path) -> None:
    """Stopped between two checkpoints, in the middle of an interval of the history: the same floats and the same files."""
    settings = config(steps=10, log_every=4)
    run(job(tmp_path / "whole", shards, settings), CPU)
    steps = iter(range(1, 11))
    first = run(job(tmp_path / "part", shards, settings), CPU, stop_requested=lambda step: next(steps) == 5)
    assert first.stopped and first.step == 5
    rows: list = []
    latest = str(tmp_path / "part" / "5")
    last = run(job(tmp_path / "part", shards, settings, resume=lambda: latest), CPU, on_row=rows.append)
    assert (last.step, last.stopped) == (10, False)
    assert [row["step"] for row in rows] == [6, 8, 9, 10]  # 6, 9 and 10 are validations
    assert history(tmp_path / "part/10") == history(tmp_path / "whole/10")
    for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
        name = f"10/{kind}.safetensors"
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_zero_stages_and_micro_batches_agree(every_step: Path, shards: tuple[str, ...], tmp_path: Path) -> None:
    for zero_stage, micro_batch in ((0, None), (2, 2), (3, 4)):
        folder = tmp_path / str(zero_stage)
        run(job(folder, shards, config(zero_stage=zero_stage, micro_batch=micro_batch)), CPU)
        assert losses(folder / "6") == pytest.approx(losses(every_step / "6"), abs=1e-5)
        ours, theirs = (load_file(place / "6" / "ema.safetensors") for place in (folder, every_step))
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "apart"),
    [
        ({"model": {"width": 16, "depth": 2, "heads": 2, "activation_checkpointing": 2}}, 1e-6),
        ({"zero_stage": 2, "zero": {"offload_optimizer": True, "overlap_comm": True}}, 1e-5),
        ({"zero_stage": 3, "zero": {"offload_optimizer": True, "offload_parameters": True}}, 1e-5),
        ({"zero_stage": 1, "zero": {"fp32_reduction": True}, "precision": "bf16"}, 5e-3),
    ],
    ids=["checkpointing", "offload", "offload all", "fp32 reduction"],
)
def test_what_saves_memory_changes_no_result_and_resumes_exactly(
    every_step: Path, shards: tuple[str, ...], tmp_path: Path, changes: dict[str, Any], apart: float
) -> None:
    run(job(tmp_path / "whole", shards, config(**changes)), CPU)
    assert losses(tmp_path / "whole/6") == pytest.approx(losses(every_step / "6"), abs=apart)
    run(job(tmp_path / "resumed", shards, config(**changes), resume=str(tmp_path / "whole/3")), CPU)
    for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
        name = f"6/{kind}.safetensors"
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bf16_is_near_fp32_and_resumes_exactly(
    every_step: Path, shards: tuple[str, ...], tmp_path: Path, zero_stage: int
) -> None:
    """Checkpoints hold the fp32 master weights, not their bf16 copies."""
    settings = config(precision="bf16", zero_stage=zero_stage)
    run(job(tmp_path / "whole", shards, settings), CPU)
    run(job(tmp_path / "resumed", shards, settings, resume=str(tmp_path / "whole/3")), CPU)
    assert losses(tmp_path / "whole/6") == pytest.approx(losses(every_step / "6"), abs=5e-3)
    assert losses(tmp_path / "whole/6") != losses(every_step / "6")
    assert history(tmp_path / "resumed/6") == history(tmp_path / "whole/6")
    weights = load_file(tmp_path / "whole/6/model.safetensors")
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())


def test_next_stage_takes_weights_average_and_moments(every_step: Path, shards: tuple[str, ...], tmp_path: Path) -> None:
    """At the same size with moments, the first step of the new stage is the seventh step of the old optimizer."""
    settings = config(steps=1, seed=6, schedule={"warmup_steps": 0})
    previous = str(every_step / "6")
    run(job(tmp_path / "next", shards, settings, init_from=previous, keep=("weights", "optimizer", "ema")), CPU)

    model = load_native(previous).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.9), weight_decay=0.03)
    moments = {kind: load_file(every_step / "6" / f"{kind}.safetensors") for kind in ("exp_avg", "exp_avg_sq")}
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {"step": torch.tensor(6.0), **{kind: moments[kind][name] for kind in moments}}
    loss_of(model, Loader(settings, shards).batch(0)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    trained = load_file(tmp_path / "next/1/model.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=2e-5)

    state = read_state(tmp_path / "next/1")
    assert (state.step, state.optimizer_steps, state.ema_updates) == (1, 7, 7)
    old_average = load_file(every_step / "6/ema.safetensors")
    new_average = load_file(tmp_path / "next/1/ema.safetensors")
    for name, tensor in old_average.items():  # update number 6: decay 7 / 16
        torch.testing.assert_close(new_average[name], 7 / 16 * tensor + 9 / 16 * trained[name], rtol=0, atol=1e-6)


def test_next_stage_at_another_resolution_starts_from_the_trained_weights(
    every_step: Path, shards: tuple[str, ...], tmp_path: Path
) -> None:
    """The position table grows with the grid; all other weights are taken over, and so the loss starts lower."""
    large = write_shards(tmp_path / "large", side=8)
    settings = config(steps=1, optimizer={"lr": 1e-9})
    run(job(tmp_path / "new", large, settings), CPU)
    run(job(tmp_path / "next", large, settings, init_from=str(every_step / "6")), CPU)
    old, new = load_file(every_step / "6/model.safetensors"), load_file(tmp_path / "next/1/model.safetensors")
    assert old["position"].shape[1] + 12 == new["position"].shape[1]  # 2 x 2 patches became 4 x 4
    assert all(torch.allclose(new[name], old[name], atol=1e-6) for name in old if name != "position")
    assert losses(tmp_path / "next/1")[0] < losses(tmp_path / "new/1")[0]


def test_a_fork_that_keeps_all_is_the_same_run_and_each_thing_left_out_begins_anew(
    every_step: Path, shards: tuple[str, ...], tmp_path: Path
) -> None:
    def forked(name: str, *keep: Kept, **changes: Any) -> Path:
        run(job(tmp_path / name, shards, config(**changes), init_from=str(every_step / "3"), keep=("weights", *keep)), CPU)
        return tmp_path / name

    same = forked("same", "optimizer", "ema", "schedule", "order")
    for name in ("model", "ema", "exp_avg", "exp_avg_sq"):
        assert (same / f"6/{name}.safetensors").read_bytes() == (every_step / f"6/{name}.safetensors").read_bytes()
    assert read_state(same / "6") == read_state(every_step / "6") and history(same / "6") == history(every_step / "6")

    def trained(folder: Path) -> list[Any]:
        return [row for row in history(folder) if row["kind"] == "train"]

    later, whole = trained(every_step / "6"), {"optimizer", "ema", "schedule", "order"}
    # The warm-up comes again, on the rows that are next; the count of steps goes on.
    warm = trained(forked("schedule", *sorted(whole - {"schedule"})) / "6")
    assert [row["lr"] for row in warm] == [2.5e-3, 5e-3, 5e-3, 2.5e-3, 5e-3, 5e-3]
    assert [row["step"] for row in warm] == [1, 2, 3, 4, 5, 6] and warm[3]["loss"] == later[3]["loss"]
    # The first rows again, at the full rate.
    again = forked("order", *sorted(whole - {"order"}))
    first = trained(again / "6")[3]
    assert (first["step"], first["lr"]) == (4, 5e-3) and first["loss"] != later[3]["loss"]
    assert read_state(again / "6").order_from == 3
    anew = trained(forked("neither", "ema", steps=3) / "3")
    assert [row["step"] for row in anew] == [1, 2, 3] and anew[0]["loss"] == pytest.approx(first["loss"], abs=1e-6)
    states = {name: read_state(forked(name, *sorted(whole - {name})) / "6") for name in ("optimizer", "ema")}
    assert (states["optimizer"].optimizer_steps, states["optimizer"].ema_updates) == (3, 6)
    assert (states["ema"].optimizer_steps, states["ema"].ema_updates) == (6, 3)


def test_data_that_grows_goes_on_with_the_same_rows_until_their_epoch_ends(
    every_step: Path, shards: tuple[str, ...], tmp_path: Path
) -> None:
    more = write_shards(tmp_path / "more", files=4)
    grown = job(tmp_path, more, config(steps=12, checkpoint_every=5), init_from=str(every_step / "3"), keep=ALL)
    run(grown, CPU)
    told, before = history(tmp_path / "12"), history(every_step / "6")
    assert [row["loss"] for row in told if row["step"] <= 6 and row["kind"] == "train"] == [
        row["loss"] for row in before if row["kind"] == "train"
    ]
    # Interrupted after it has grown, it goes on as if it had not been.
    run(replace(grown, work_folder=str(tmp_path / "w"), publish=KeepIn(str(tmp_path / "again")), resume=str(tmp_path / "5")), CPU)
    assert history(tmp_path / "again/12") == told and read_state(tmp_path / "12").growth == [(0, 2), (24, 4)]
    fewer = replace(grown, shards=more[:1], publish=KeepIn(str(tmp_path / "fewer")))
    with pytest.raises(CheckpointError, match="saved with rows .*; leave order out of what is kept"):
        run(fewer, CPU)


def test_losses_that_are_not_finite_before_any_checkpoint_stop_with_their_steps(
    alone: None, shards: tuple[str, ...], tmp_path: Path
) -> None:
    wild = config(gradient_clip=0.0, optimizer={"lr": 1.0, "betas": (0.0, 0.0)}).model_copy(
        update={"optimizer": AdamW.model_construct(lr=1e30, weight_decay=0.0, betas=(0.0, 0.0))}
    )
    steps = "; ".join(rf"step {step}: loss (nan|inf), gradient norm (nan|inf)" for step in (2, 3, 4, 5))
    with pytest.raises(TrainingError, match=rf"^step 5: 4 steps in a row were skipped \({steps}\), and there is no checkpoint"):
        run(job(tmp_path, shards, wild), CPU)
    assert not (tmp_path / "3").exists()


def test_checkpoints_of_other_runs_are_refused(every_step: Path, shards: tuple[str, ...], tmp_path: Path) -> None:
    previous = str(every_step / "6")
    with pytest.raises(CheckpointError, match="saved with global_batch 8, this run has 4"):
        run(job(tmp_path, shards, config(global_batch=4), resume=previous), CPU)
    deeper = config(model={"width": 16, "depth": 4, "heads": 2})
    with pytest.raises(CheckpointError, match="its model has depth 2, this run's has 4"):
        run(job(tmp_path, shards, deeper, init_from=previous), CPU)
    finer = config(model={"width": 16, "depth": 2, "heads": 2, "patch": 1})
    with pytest.raises(CheckpointError, match="its model has patch 2, this run's has 1"):
        run(job(tmp_path, shards, finer, init_from=previous), CPU)
    without = write_shards(tmp_path / "without", clip=False)
    with pytest.raises(CheckpointError, match="it models text, clip, latent, and the latents hold text, latent$"):
        run(job(tmp_path, without, config(), init_from=previous), CPU)
    with pytest.raises(CheckpointError, match="is this a checkpoint folder"):
        run(job(tmp_path, shards, config(), resume=str(tmp_path)), CPU)


def test_lanes_are_the_greatest_divisor_of_the_batch_that_gives_each_eight_rows() -> None:
    found = {batch: TrainConfig(steps=1, global_batch=batch).lanes for batch in (1, 12, 32, 37, 34, 1024)}
    assert found == {1: (1,), 12: (12,), 32: (32,), 37: (1,), 34: (17,), 1024: (128,)}
    # Those of the paper's stages go into its 88 workers.
    paper = [TrainConfig(steps=1, global_batch=batch, workers=88).lanes[0] / 88 for batch in (11264, 2112)]
    assert paper == [16, 3]
    # A lane that two workers share is read twice.
    for batch, workers in ((64, 8), (96, 12), (256, 8), (1024, 64), (2112, 88), (2112, 66), (11264, 88)):
        (lanes,) = TrainConfig(steps=1, global_batch=batch).lanes
        of_row = np.arange(batch) * lanes // batch
        read = sum(len(set(part.tolist())) for part in np.split(of_row, workers))
        assert read / lanes <= 1 + 8 * workers / batch
    narrow: Any = {"shuffle_window": 4}
    assert TrainConfig(steps=1, global_batch=64, data=narrow).lanes == (16,)


def test_config_errors_say_what_is_expected() -> None:
    for changes, message in (
        ({"global_batch": 9, "workers": 2}, "not divisible by workers 2"),
        ({"micro_batch": 3}, "does not divide the 8 samples of a worker"),
        ({"data": {"where": ["aesthetic 5"]}}, "write COLUMN OP VALUE"),
        ({"data": {"lanes": 3}}, "not divisible by data.lanes 3"),
        ({"schedule": {"decay": "cosine"}}, "needs decay_steps"),
        (
            {"schedule": {"decay": "linear", "warmup_steps": 5, "decay_start": 4}},
            r"needs decay_start of at least warmup_steps \(5",
        ),
        (
            {"schedule": {"decay": "linear", "warmup_steps": 5, "decay_start": 8}},
            r"needs decay_steps greater than decay_start \(8",
        ),
        ({"schedule": {"decay_steps": 9}}, "decay_steps is for decay cosine or linear, and decay is none: set that, or leave"),
        (
            {"schedule": {"decay": "cosine", "decay_steps": 9, "decay_start": 3}},
            "decay_start is for decay linear, and decay is cosine",
        ),
        ({"schedule": {"decay": "plateau", "final_fraction": 0.1}}, "final_fraction is for decay cosine or linear"),
        ({"schedule": {"patience": 3}}, "patience is for decay plateau, and decay is none"),
        ({"schedule": {"decay": "plateau"}, "validation": {"fraction": 0}}, "give validation.fraction a value above 0"),
        ({"zero_stage": 0, "precision": "bf16"}, "use zero_stage 1, or precision fp32"),
        ({"optimizer": {"kind": "sgd"}}, "kind is adamw or muon"),
        ({"optimizer": {"kind": "muon", "betas": [0.9, 0.9]}}, "Extra inputs are not permitted"),
        (
            {"optimizer": {"kind": "muon"}, "lora": {}},
            "the matrices of the blocks, which lora freezes; use adamw",
        ),
        ({"noise": {"beta_start": 0.5, "beta_end": 0.4}}, "beta_start 0.5 is above beta_end 0.4"),
        ({"model": {"width": 16, "depth": 3, "heads": 2}}, "must be even"),
        ({"compile": True, "zero_stage": 3}, "compile cannot follow zero_stage 3, .*; leave compile out, or use zero_stage 2"),
        ({"zero_stage": 0, "zero": {"offload_optimizer": True}}, "use zero_stage 1, 2 or 3"),
        ({"zero_stage": 0, "zero": {"fp32_reduction": True}}, "of no use with zero_stage 0, which computes in fp32"),
        ({"zero_stage": 2, "zero": {"offload_parameters": True}}, "zero.offload_parameters needs zero_stage 3, not 2"),
        ({"zero": {"offload_optimizer": True}, "optimizer": {"kind": "muon"}}, "use optimizer.kind adamw, or leave it out"),
        ({"micro_batch": 0}, "greater than or equal to 1"),
        ({"learning_rate": 1}, "Extra inputs are not permitted"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**copy.deepcopy(changes))


def test_a_noise_schedule_of_its_own_is_trained_with_and_goes_with_the_checkpoint(
    alone: None, shards: tuple[str, ...], tmp_path: Path
) -> None:
    settings = config(steps=1, noise={"beta_start": 0.005, "beta_end": 0.02})
    run(job(tmp_path, shards, settings), CPU)
    found = losses_of(start(shards, settings), Loader(settings, shards).batch(0), betas=(0.005, 0.02))
    expected = sum(WEIGHTS[part] * mse.item() for part, mse in found.items())
    told = next(row for row in history(tmp_path / "1") if row["kind"] == "train")
    assert told["loss"] == pytest.approx(expected, abs=2e-6)
    assert load_native(tmp_path / "1").config.noise == settings.noise
