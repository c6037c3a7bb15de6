"""The moving average of the weights, in fp32, sharded like the master weights: each worker keeps the average of its share."""

from __future__ import annotations

import torch

from training.config import EmaConfig
from training.masters import Masters


def ema_decay(updates: int, config: EmaConfig) -> float:
    """Decay of update number `updates`, counted from 0: the configured one, less while there is little to average.

    >>> ema_decay(0, EmaConfig()), ema_decay(10**6, EmaConfig())
    (0.1, 0.9999)
    """
    return min(config.decay, (1 + updates) / (10 + updates)) if config.warmup else config.decay


class Ema:
    """ema <- decay * ema + (1 - decay) * weights, after every optimizer step.

    Attributes:
        vectors: this worker's share of the average, laid out like `Masters.vectors`.
        updates: updates so far; goes on from stage to stage, so that a new stage does not forget the one before.
    """

    def __init__(self, masters: Masters, config: EmaConfig) -> None:
        self.masters, self.config, self.updates = masters, config, 0
        self.vectors = [vector.detach().clone().float() for vector in masters.vectors]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        decay = ema_decay(self.updates, self.config)
        for average, weights in zip(self.vectors, self.masters.vectors, strict=True):
            average.lerp_(weights.detach().view_as(average), 1 - decay)
        self.updates += 1
