"""Training that can be stopped at any moment: a state file every minute, a line every few seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

SAVE_EVERY_SECONDS = 60.0
SHOW_EVERY_SECONDS = 15.0
WEIGHT_DECAY = 0.01


def late_fall(steps: int, peak: float, warmup: int = 100, decay: float = 0.35) -> Callable[[int], float]:
    """Learning rate of a step: up linearly, then `peak`, then linearly to a fiftieth of it over the last `decay` of all steps."""
    return lambda step: peak * max(0.02, min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps)))


def cosine_fall(steps: int, peak: float, warmup: int = 100) -> Callable[[int], float]:
    """Learning rate of a step: up linearly to `peak`, then down along half a cosine to nothing at the last of all steps."""

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return rate


class Averaged:
    """An exponential moving average of a model's parameters, short at the start so that early weights are usable."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - keep)
            else:
                self.values[name].copy_(value)


def adamw(parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW over parameters or groups of them, with the settings that all of the examples share."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)


def train(
    state_file: Path,
    model: nn.Module,
    loss_at: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    rate: Callable[[int], float],
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    decay: float = 0.998,
    watch: Callable[[int, Averaged], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Train to `steps`, resuming from `state_file`, and return the averaged weights: at once, if it is that far.

    Args:
        state_file: written every minute, first under another name, then renamed.
        loss_at: the loss of one step and figures to print. Its data must depend on the step alone, so that a resumed run
            sees what an uninterrupted one would have.
        rate: the learning rate of a step.
        optimizers: between them they have all parameters; a group may have a `scale` of its learning rate. `adamw` if None.
        decay: of the average of the weights.
        watch: called after every step, with the number of steps done and the average so far.
    """
    optimizers = optimizers or [adamw(model.parameters())]
    average, first = Averaged(model, decay), 0
    if state_file.exists():
        state = torch.load(state_file, map_location=next(model.parameters()).device, weights_only=True)
        if "optimizers" not in state:
            raise SystemExit(f"{state_file} is of an older version: delete it to train anew")
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        average.values, first = state["average"], state["step"]
        print(f"{state_file.stem}: going on from step {first}", flush=True)

    def save(step: int) -> None:
        state_file.parent.mkdir(parents=True, exist_ok=True)
        partial = state_file.with_suffix(".partial")
        state = {"model": model.state_dict(), "average": average.values, "step": step}
        torch.save(state | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}, partial)
        partial.replace(state_file)

    shown = saved = time.monotonic()
    since = first
    for step in range(first, steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.get("scale", 1.0) * rate(step)
        model.zero_grad(set_to_none=True)
        loss, figures = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update(model, step)
        if watch is not None:
            watch(step + 1, average)
        now = time.monotonic()
        if now - shown >= SHOW_EVERY_SECONDS or step + 1 == steps:
            text = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
            speed = (step + 1 - since) / (now - shown + 1e-9)
            print(f"{state_file.stem}: {step + 1}/{steps} loss {loss.item():.4f} {text} {speed:.2f} steps/s", flush=True)
            shown, since = now, step + 1
        if now - saved >= SAVE_EVERY_SECONDS:
            save(step + 1)
            saved = now
    if first < steps:
        save(steps)
    return average.values
