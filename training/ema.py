"""The moving average of the weights, in fp32, sharded like the master weights: each worker keeps the average of its share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from training.averaging import EmaConfig, ema_decay


class Weighted(Protocol):
    """Weights in some tensors, such as `training.masters.Masters`."""

    @property
    def vectors(self) -> Sequence[Tensor]: ...


class Ema:
    """ema <- decay * ema + (1 - decay) * weights, after every optimizer step.

    Attributes:
        vectors: this worker's share of the average, laid out like those of the weights.
        updates: updates so far; goes on from stage to stage, so that a new stage does not forget the one before.
    """

    def __init__(self, weights: Weighted, config: EmaConfig) -> None:
        self.weights, self.config, self.updates = weights, config, 0
        self.vectors = [vector.detach().clone().float() for vector in weights.vectors]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        decay = ema_decay(self.updates, self.config)
        now = [vector.detach().view_as(average) for average, vector in zip(self.vectors, self.weights.vectors, strict=True)]
        torch._foreach_lerp_(self.vectors, now, 1 - decay)
        self.updates += 1
