"""Muon for the filters of convolutions, each as a matrix of a row a filter (kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from training.optimizers.orthogonal import orthogonalised

MOMENTUM = 0.95


def of_a_filter(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of an autoencoder is the weight of a convolution between its two ends."""
    return parameter.ndim == 4 and name.split(".")[1] not in ("conv_in", "conv_out")


class FilterMuon(torch.optim.Optimizer):
    """Orthogonalised momentum. The learning rate is the spectral norm of an update, whatever the size of the filters: that of a
    filter's matrix at the start hardly depends on its size either."""

    def __init__(self, filters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(filters, {"lr": lr, "initial_lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step of the filters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                matrix = parameter.grad.lerp(momentum, MOMENTUM).flatten(1)
                update = orthogonalised(matrix[None], torch.bfloat16)[0].float().view_as(parameter)
                parameter.add_(update, alpha=-group["lr"])
