"""Stands between the gradient and the optimizer on every ZeRO stage: measures the norm, and skips a step that is damaged.

DeepSpeed skips a step whose gradient has no finite norm, as mixed precision does, and leaves the optimizer's state alone. So a
step is refused by telling it that the norm is infinite. Without ZeRO it has neither a norm nor such a skip: both are here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def unless_finite(loss: Tensor) -> Tensor:
    """The loss, such that its gradient is not finite where it is not, although the formula might give one that is."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


class Guard:
    """Of one engine; in place before its first step.

    Args:
        clip: greatest norm of the gradient where DeepSpeed does not clip, which is without ZeRO; 0 for no clipping.
        refuses: whether a gradient of this norm is damage; the same on all workers.

    Attributes:
        norm: of the last gradient, before clipping.
        applied: whether the optimizer took the last step.
    """

    def __init__(self, engine: Any, zero_stage: int, clip: float, refuses: Callable[[float], bool]) -> None:
        self.engine, self.clip, self.refuses = engine, clip, refuses
        self.norm, self.applied = math.inf, False
        zero = engine.optimizer
        if zero_stage == 0:
            self._parameters = [p for group in zero.param_groups for p in group["params"]]
            self._step, zero.step = zero.step, self._guarded_step
        elif zero_stage == 3:
            self._norms, zero._get_norm_groups = zero._get_norm_groups, self._guarded_norms
        else:
            self._whole, zero.scaled_global_norm = zero.scaled_global_norm, self._guarded_norm

    def step(self) -> None:
        """The engine's step, after a micro-batch's backward pass."""
        self.norm, self.applied = math.inf, False
        self.engine.step()

    def _accepts(self, norm: Tensor) -> bool:
        self.norm = float(norm)
        self.applied = not self.refuses(self.norm)
        return self.applied

    def _guarded_norm(self, norm_type: int = 2) -> Tensor:
        """ZeRO 1 and 2."""
        norm = self._whole(norm_type)
        return norm if self._accepts(norm) else torch.full_like(norm, math.inf)

    def _guarded_norms(self) -> list[Tensor]:
        """ZeRO 3, which combines the norms of its groups."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norms = self._norms()
        return norms if self._accepts(combine_grad_norm_groups(norms)) else [torch.full_like(norms[0], math.inf)]

    def _guarded_step(self, *args: Any, **more: Any) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._accepts(norm):
            if self.clip:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip, norm)
            self._step(*args, **more)
