"""AdamW and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from training.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    The warm-up gives peak * (step + 1) / warmup_steps, so that its last step has the full rate.

    >>> learning_rate(0, 1.0, ScheduleConfig(warmup_steps=4))
    0.25
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay == "none" or schedule.decay_steps is None:
        return peak
    progress = min(1.0, (step - schedule.warmup_steps) / (schedule.decay_steps - schedule.warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * share)


def adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW over all that is trained, biases and position table included, as U-ViT trains them.

    Fused: one pass over the memory, and no temporaries of the parameters' size.
    """
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
