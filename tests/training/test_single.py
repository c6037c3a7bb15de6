"""A small model in one process: the trainer's own optimizer, rates and average, and a state from which it goes on the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training import single
from training.averaging import EmaConfig
from training.optimizers.adamw import AdamW
from training.rates import ScheduleConfig, learning_rate
from training.single import SingleTraining, late_fall

SCHEDULE = ScheduleConfig(warmup_steps=2, decay="cosine", decay_steps=8)
SETTINGS = AdamW(lr=0.1, weight_decay=0.1)


def made(file: Path | None = None, clip: float = 1.0) -> SingleTraining:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return SingleTraining(model, [SETTINGS.build(model.named_parameters())], SCHEDULE, EmaConfig(decay=0.9), clip, file)


def loss_of(training: SingleTraining, step: int) -> tuple[Tensor, dict[str, float]]:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return training.model(x).square().sum(), {"step": float(step)}


def run(training: SingleTraining, steps: int) -> list[float]:
    return [step.loss for step in training.run(lambda step: loss_of(training, step), steps)]


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_it_trains_as_torch_does_by_hand(clip: float) -> None:
    training = made(clip=clip)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.9), weight_decay=0.1)
    average = [value.detach().clone() for value in model.parameters()]
    losses = []
    for step in range(8):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 0.1, SCHEDULE)
        optimizer.zero_grad()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().sum()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
        keep = min(0.9, (1 + step) / (10 + step))
        average = [keep * a + (1 - keep) * value.detach() for a, value in zip(average, model.parameters(), strict=True)]
    assert run(training, 8) == pytest.approx(losses, rel=1e-5)
    training.take_average()
    for ours, theirs in zip(training.model.parameters(), average, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_it_goes_on_from_its_state_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "SAVE_EVERY_SECONDS", 0.0)
    straight, file = made(), tmp_path / "state" / "x.pt"
    losses = run(straight, 8)
    broken = made(file)
    for step in broken.run(lambda step: loss_of(broken, step), 8):
        if step.done == 5:
            break
    resumed = made(file)
    assert resumed.done == 5 and run(resumed, 8) == losses[5:]
    straight.take_average()
    resumed.take_average()
    for ours, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert made(file).done == 8 and run(made(file), 8) == []


@pytest.mark.parametrize("steps", [1, 3, 40, 4000])
def test_a_late_fall_ends_at_a_fiftieth(steps: int) -> None:
    rates = [learning_rate(step, 1.0, late_fall(steps)) for step in range(steps + 1)]
    assert rates[-1] == pytest.approx(0.02, abs=1e-6) or steps < 4
    if steps == 4000:
        assert rates[99] == rates[2599] == 1.0 and rates[3300] == pytest.approx(0.51) and rates[0] == 0.01
