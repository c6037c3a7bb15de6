"""How the small encoders are trained: AdamW, a late fall of the learning rate, an average of the weights, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from training.averaging import EmaConfig
from training.optimizers.adamw import AdamW
from training.single import SingleTraining, late_fall

SHOW_EVERY_SECONDS = 15.0
AVERAGE = EmaConfig(decay=0.998)


def adamw(peak: float) -> AdamW:
    """AdamW with the settings that all of the encoders share, and the peak of the learning rate."""
    return AdamW(lr=peak, betas=(0.9, 0.98), weight_decay=0.01)


def train(
    state_file: Path,
    model: nn.Module,
    loss_at: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    *optimizers: torch.optim.Optimizer,
) -> None:
    """Train to `steps`, or go on where the last run stopped, and leave the averaged weights in the model.

    Args:
        state_file: written every minute.
        loss_at: the loss of one step and figures to print; its data must depend on the step alone.
    """
    training = SingleTraining(model, optimizers, late_fall(steps), AVERAGE, file=state_file)
    if training.done:
        print(f"{state_file.stem}: going on from step {training.done}", flush=True)
    shown, since = time.monotonic(), training.done
    for done, loss, figures in training.run(loss_at, steps):
        now = time.monotonic()
        if now - shown >= SHOW_EVERY_SECONDS or done == steps:
            text = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
            speed = (done - since) / (now - shown + 1e-9)
            print(f"{state_file.stem}: {done}/{steps} loss {loss:.4f} {text} {speed:.2f} steps/s", flush=True)
            shown, since = now, done
    training.take_average()
