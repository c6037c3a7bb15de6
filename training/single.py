"""Training of a small model in one process, without DeepSpeed: codecs and encoders, which are trained before a U-ViT and frozen.

Step, learning rate, moving average and optimizers are those of the trainer. What a step sees must depend on the number of the
step alone, so that a training that goes on from its saved state ends as one that was never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.averaging import EmaConfig
from training.ema import Ema
from training.rates import ScheduleConfig, set_learning_rates

SAVE_EVERY_SECONDS = 60.0


class Step(NamedTuple):
    """What a step gave: the number of steps done with it, the loss, and further figures by name."""

    done: int
    loss: float
    figures: dict[str, float]


class SingleTraining:
    """A model, what trains it, and how far that is.

    Args:
        model: all of its parameters are trained.
        optimizers: between them they have all parameters; their groups say `initial_lr`, as those of `training.optimizers` do.
        schedule: of the learning rates.
        ema: of the average of the weights; None for none.
        clip: greatest norm of the gradient; 0 for no clipping.
        file: state of the training, written every minute, first under another name; None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedule: ScheduleConfig,
        ema: EmaConfig | None = None,
        clip: float = 1.0,
        file: Path | None = None,
    ) -> None:
        self.model, self.optimizers, self.schedule, self.clip, self.file = model, optimizers, schedule, clip, file
        self.parameters = list(model.parameters())
        self.vectors = [parameter.detach() for parameter in self.parameters]
        self.ema = Ema(self, ema) if ema is not None else None
        self.done = 0
        if file is not None and file.exists():
            self._take(torch.load(file, map_location=self.parameters[0].device, weights_only=True))

    def run(self, loss_at: Callable[[int], tuple[Tensor, dict[str, float]]], steps: int) -> Iterator[Step]:
        """Train to `steps`, and give what every step gave; `loss_at` gives the loss of a step, from 0, and figures to show."""
        saved = time.monotonic()
        for step in range(self.done, steps):
            for optimizer in self.optimizers:
                set_learning_rates(optimizer, step, self.schedule)
                optimizer.zero_grad(set_to_none=True)
            loss, figures = loss_at(step)
            loss.backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.parameters, self.clip)
            for optimizer in self.optimizers:
                optimizer.step()
            if self.ema is not None:
                self.ema.update()
            self.done = step + 1
            if time.monotonic() - saved >= SAVE_EVERY_SECONDS or self.done == steps:
                self.save()
                saved = time.monotonic()
            yield Step(self.done, loss.item(), figures)

    @torch.no_grad()
    def take_average(self) -> None:
        """Give the model its averaged weights; the training is over."""
        assert self.ema is not None
        for parameter, average in zip(self.parameters, self.ema.vectors, strict=True):
            parameter.copy_(average)

    def save(self) -> None:
        """Write the state, if it has a file."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        average = None if self.ema is None else {"vectors": self.ema.vectors, "updates": self.ema.updates}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save({"model": self.model.state_dict(), "optimizers": optimizers, "ema": average, "done": self.done}, partial)
        partial.replace(self.file)

    def _take(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        if self.ema is not None:
            self.ema.vectors, self.ema.updates = state["ema"]["vectors"], state["ema"]["updates"]
        self.done = state["done"]


def late_fall(steps: int) -> ScheduleConfig:
    """A warm-up, a constant rate, and over the last third a straight fall to a fiftieth: good weights at the end of few steps."""
    warmup = min(100, steps // 4)
    start = max(warmup, round(0.65 * steps))
    return ScheduleConfig(
        warmup_steps=warmup, decay="linear", decay_start=start, decay_steps=max(start + 1, steps), final_fraction=0.02
    )
