"""Steps and rows that are damaged: skipped, gone back from, counted, and told, as plain torch would have trained without them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stages.committed import damage_moments
from tests.training.plain import loss_of, start
from tests.training.synthetic import KeepIn, config, history, poison, write_shards
from training.begin import ALL
from training.checkpoint import read_state
from training.config import TrainConfig
from training.damage import USUAL, Damage, DamageConfig
from training.guard import unless_finite
from training.history import read_history
from training.job import TrainingError, TrainJob
from training.latents import ShardError
from training.loader import Loader
from training.loop import run
from unidiffuser.weights import load_native, save_native

CPU = torch.device("cpu")
# Steps count from 0 in the loader, so this is the fifth.
BAD = 4


def settings(**changes: Any) -> TrainConfig:
    return config(**{"checkpoint_every": 2, "schedule": {"warmup_steps": 0}, "steps": 7, **changes})


@pytest.fixture(scope="module")
def shards(alone: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """With one row, which the fifth step reads, that makes the loss infinite."""
    written = write_shards(tmp_path_factory.mktemp("shards"))
    poison(written, Loader(settings(), written).keys(BAD)[3])
    return written


def trained(shards: tuple[str, ...], batches: list[int]) -> torch.nn.Module:
    """What plain torch makes of these batches."""
    model, loader = start(shards, settings()), Loader(settings(), shards)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.9), weight_decay=0.03)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, loader.batch(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


def assert_near(folder: Path, model: torch.nn.Module) -> None:
    found = load_native(folder).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-5)


def job(folder: Path, shards: tuple[str, ...], damage: dict[str, Any], **changes: Any) -> TrainJob:
    return TrainJob(settings(damage=damage, **changes), shards, str(folder / "work"), KeepIn(str(folder)), fork="`from: x`")


@pytest.mark.parametrize(("zero_stage", "micro_batch"), [(0, None), (1, 2), (2, None), (3, None)])
def test_a_step_that_is_not_finite_is_skipped_on_every_stage(
    shards: tuple[str, ...], tmp_path: Path, zero_stage: int, micro_batch: int | None
) -> None:
    rows: list[Any] = []
    run(job(tmp_path, shards, {}, zero_stage=zero_stage, micro_batch=micro_batch), CPU, on_row=rows.append)
    assert_near(tmp_path / "7", trained(shards, [0, 1, 2, 3, 5, 6]))
    state = read_state(tmp_path / "7")
    assert (state.step, state.optimizer_steps, state.ema_updates, state.damage.skipped) == (7, 6, 6, 1)
    told = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in told] == [1, 2, 3, 4, 6, 7] and [row.get("skipped") for row in told[-3:]] == [None, 1, 1]
    assert all(0 < row["grad_norm"] < 100 for row in told)
    assert "step 5: loss inf" in state.damage.seen[0] or "step 5: loss nan" in state.damage.seen[0]


def test_too_many_go_back_to_the_last_checkpoint_and_on_past_their_places(shards: tuple[str, ...], tmp_path: Path) -> None:
    rows: list[Any] = []
    wanted = job(tmp_path, shards, {"steps_in_a_row": 0})
    run(wanted, CPU, on_row=rows.append)
    assert_near(tmp_path / "7", trained(shards, [0, 1, 2, 3, 5, 6, 7]))
    said = [row["said"] for row in rows if row["kind"] == "damage"]
    assert said == ["a step was skipped: went back from step 5 to the checkpoint of step 4, and on past the places between"]
    assert [row["said"] for row in history(tmp_path / "7") if row["kind"] == "damage"] == said
    state = read_state(tmp_path / "7")
    assert (state.order_from, state.optimizer_steps, state.damage.rollbacks, state.damage.skipped) == (-1, 7, 1, 1)
    # Killed after it went back, it is the same run.
    again = TrainJob(wanted.config, shards, str(tmp_path / "w"), KeepIn(str(tmp_path / "again")), resume=str(tmp_path / "6"))
    run(again, CPU)
    assert history(tmp_path / "again/7") == history(tmp_path / "7")
    share = "7/share-00000-of-00001.safetensors"
    assert (tmp_path / "again" / share).read_bytes() == (tmp_path / share).read_bytes()


def test_a_stop_waits_for_a_step_that_is_not_skipped(shards: tuple[str, ...], tmp_path: Path) -> None:
    outcome = run(job(tmp_path, shards, {}, checkpoint_every=100), CPU, stop_requested=lambda step: step >= BAD + 1)
    assert outcome.stopped and KeepIn(str(tmp_path)).steps() == [outcome.step] == [BAD + 2]


def test_a_trace_that_is_broken_off_ends(shards: tuple[str, ...], tmp_path: Path) -> None:
    """The fifth step goes back to the checkpoint of step 4, when that step is traced already."""
    traced: list[str] = []
    on = job(tmp_path, shards, {"steps_in_a_row": 0}, profile={"from": 4, "steps": 3})
    run(replace(on, traced=traced.append), CPU)
    assert not traced and not torch.autograd._profiler_enabled()


def test_more_rollbacks_than_are_allowed_stop_with_what_was_seen(shards: tuple[str, ...], tmp_path: Path) -> None:
    line = (
        r"^step 5: a step was skipped \(step 5: loss (inf|nan), gradient norm inf\), and damage.rollbacks allows 0: lower .*, "
        "and go on from the last checkpoint with `from: x`, or check the latents of these steps$"
    )
    with pytest.raises(TrainingError, match=line):
        run(job(tmp_path, shards, {"steps_in_a_row": 0, "rollbacks": 0}), CPU)
    assert KeepIn(str(tmp_path)).steps() == [2, 4]


def test_a_checkpoint_from_which_no_step_can_be_taken_is_no_good_one(alone: None, tmp_path: Path) -> None:
    """All rows are bad: it goes back to the checkpoint of step 4, then to that of step 2, from which it cannot go back."""
    good, bad = write_shards(tmp_path / "good"), write_shards(tmp_path / "bad")
    run(job(tmp_path, good, {}, steps=4), CPU)
    for number in range(80):
        poison(bad, f"{number // 40:04d}{number % 40:04d}")
    on = TrainJob(
        settings(damage={"steps_in_a_row": 1, "rollbacks": 2}, steps=30), bad, str(tmp_path / "work"), KeepIn(str(tmp_path)),
        resume=str(tmp_path / "4"), fork="`from: x`",
    )  # fmt: skip
    with pytest.raises(TrainingError, match="damage.rollbacks allows 2"):
        run(on, CPU)
    assert KeepIn(str(tmp_path)).steps() == [2]


def begun(folder: Path, shards: tuple[str, ...], **more: Any) -> TrainJob:
    """With no checkpoint of its own before its end."""
    on = settings(damage={"steps_in_a_row": 0}, checkpoint_every=100)
    return TrainJob(on, shards, str(folder / "work"), KeepIn(str(folder / "own")), fork="`from: x`", **more)


def test_before_its_first_checkpoint_a_run_goes_back_to_the_one_that_it_began_from(
    shards: tuple[str, ...], tmp_path: Path
) -> None:
    run(job(tmp_path, shards, {}, steps=4), CPU)
    rows: list[Any] = []
    run(begun(tmp_path, shards, init_from=str(tmp_path / "4"), keep=ALL), CPU, on_row=rows.append)
    assert_near(tmp_path / "own/7", trained(shards, [0, 1, 2, 3, 5, 6, 7]))
    assert [row["said"] for row in rows if row["kind"] == "damage"] == [
        "a step was skipped: went back from step 5 to what it began from, and on past the places between"
    ]
    state = read_state(tmp_path / "own/7")
    assert (state.order_from, state.optimizer_steps, state.damage.rollbacks, state.damage.skipped) == (-1, 7, 1, 1)


@pytest.mark.parametrize("kind", ["init_from", "weights"])
def test_what_counts_anew_begins_anew_on_past_the_places_too(shards: tuple[str, ...], tmp_path: Path, kind: str) -> None:
    run(job(tmp_path, shards, {}, steps=4), CPU)
    if kind == "weights":
        save_native(tmp_path / "4", load_native(tmp_path / "4"))
    run(begun(tmp_path, shards, **{kind: str(tmp_path / "4")}), CPU)
    state = read_state(tmp_path / "own/7")
    # Its places 0 to 4, and 5 to 8 in vain: the ninth is of the next epoch, in which the row comes again.
    assert (state.order_from, state.optimizer_steps, state.damage.rollbacks, state.damage.skipped) == (-9, 7, 2, 2)
    assert [row["step"] for row in history(tmp_path / "own/7") if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7]


def test_where_no_step_can_be_taken_from_its_first_checkpoint_it_goes_back_to_what_it_began_from(
    shards: tuple[str, ...], tmp_path: Path
) -> None:
    """That of step 4 is its own, that of step 2 another's."""
    run(job(tmp_path, shards, {}, steps=4), CPU)
    shutil.copytree(tmp_path / "4", tmp_path / "own/4")
    bad = write_shards(tmp_path / "bad")
    for number in range(80):
        poison(bad, f"{number // 40:04d}{number % 40:04d}")
    rows: list[Any] = []
    on = replace(begun(tmp_path, bad, init_from=str(tmp_path / "2"), keep=ALL), resume=str(tmp_path / "own/4"))
    with pytest.raises(TrainingError, match="damage.rollbacks allows 3"):
        run(on, CPU, on_row=rows.append)
    said = [row["said"].split(": ")[1].split(",")[0] for row in rows if row["kind"] == "damage"]
    assert said == [
        "went back from step 5 to the checkpoint of step 4",
        "went back from step 5 to what it began from",
        "went back from step 3 to what it began from",
    ]
    assert KeepIn(str(tmp_path / "own")).steps() == []


def test_a_loss_that_is_not_finite_has_no_finite_gradient_and_any_other_keeps_its_own() -> None:
    for constant, expected in ((3.0, 2.0), (float("inf"), float("nan"))):
        weight = torch.ones((), requires_grad=True)
        unless_finite(2 * weight + constant).backward()
        torch.testing.assert_close(weight.grad, torch.tensor(expected), equal_nan=True)


def test_a_spike_is_a_norm_far_above_the_usual_one() -> None:
    rule, damage = DamageConfig(spike=3.0), Damage()
    for step in range(USUAL):
        assert not damage.refuses(100.0, rule), step
        damage.applied(2.0)
    assert damage.usual == pytest.approx(2.0)
    assert damage.refuses(6.1, rule) and not damage.refuses(5.9, rule) and not damage.refuses(1e9, DamageConfig())
    assert damage.refuses(float("nan"), DamageConfig()) and damage.refuses(float("inf"), DamageConfig())
    damage.applied(4.0)
    assert damage.usual == pytest.approx(2.02)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_spike_is_skipped_before_the_optimizer(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    """With a usual norm so small that every step after the second is a spike."""
    monkeypatch.setattr("training.damage.USUAL", 2)

    def applied(self: Damage, norm: float) -> None:
        self.steps, self.usual = self.steps + 1, norm / 1000

    monkeypatch.setattr(Damage, "applied", applied)
    clean = write_shards(tmp_path / "shards")
    on = job(tmp_path, clean, {"spike": 2.0, "steps_in_a_row": 1, "rollbacks": 0}, zero_stage=zero_stage)
    with pytest.raises(TrainingError, match=r"step 3: loss \d.*, gradient norm \d.*; step 4: loss \d"):
        run(on, CPU)
    assert KeepIn(str(tmp_path)).steps() == [2]
    assert_near(tmp_path / "2", trained(clean, [0, 1]))


def test_rows_of_the_next_group_take_the_place_of_a_damaged_one_as_often_as_is_allowed(alone: None, tmp_path: Path) -> None:
    whole, broken = write_shards(tmp_path / "whole"), write_shards(tmp_path / "broken")
    damage_moments(broken[1], 2)
    with pytest.raises(ShardError, match="00001.parquet: row group 2 cannot be read"):
        run(job(tmp_path / "none", broken, {}), CPU)
    run(job(tmp_path / "one", broken, {"skip_damaged": 1}), CPU)
    assert [row["damaged_groups"] for row in read_history(tmp_path / "one/7/history.jsonl") if row["kind"] == "train"][-1] == 1

    loader, peer = (Loader(settings(damage={"skip_damaged": 1}), paths) for paths in (broken, whole))
    hit = {f"0001{row:04d}" for row in range(16, 24)}
    others = 0
    for step in range(7):
        keys, theirs = loader.keys(step), peer.keys(step)
        same = [key == other for key, other in zip(keys, theirs, strict=True)]
        assert [other in hit for other in theirs] == [not one for one in same]
        assert all(f"0001{24:04d}" <= key <= f"0001{31:04d}" for key in keys if key not in theirs)
        others += same.count(False)
    assert others > 0
    damage_moments(broken[0], 0)
    with pytest.raises(ShardError, match=r"^2 row groups are damaged, and damage.skip_damaged allows 1: .*row group"):
        run(job(tmp_path / "two", broken, {"skip_damaged": 1}), CPU)


def test_a_subset_whose_row_groups_are_all_damaged_is_told(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    weights = settings(damage={"skip_damaged": 50}, data={"weights": {"web": 1, "art": 1}})
    loader = Loader(weights, shards, subsets=("web", "art"))
    for group in range(5):
        damage_moments(shards[1], group)
    with pytest.raises(ShardError, match="00001.parquet: no row group is left in place of a damaged one"):
        loader.batch(0)
