"""Muon for the matrices of the blocks, and AdamW for the rest (kellerjordan.github.io/posts/muon).

Updates have the root mean square of AdamW's (0.2 * sqrt(the greater side), arXiv 2502.16982), so that AdamW's learning rates and
weight decays serve both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from training.optimizers.adamw import MOMENTS, AdamWFields, is_matrix
from training.section import Section

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

MOMENTUM = ("momentum_buffer",)


def of_a_block(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a U-ViT is a matrix of one of its blocks."""
    return "_block" in name.split(".")[0] and is_matrix(name, parameter)


class Muon(Section):
    """Muon, with AdamW for what is no matrix of a block."""

    kind: Literal["muon"] = Field("muon", description="Muon for the matrices of the blocks, AdamW for the rest.")
    lr: float = Field(2e-4, gt=0, le=1, description="Learning rate of the matrices after the warm-up, on the scale of AdamW's.")
    weight_decay: float = Field(0.03, ge=0, le=1, description="Decoupled weight decay of the matrices.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay of the momentum, which is Nesterov's.")
    iteration: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Arithmetic of the orthogonalisation; auto: bf16, as torch's, where all devices have it, else fp32."
    )
    rest: AdamWFields = Field(default_factory=AdamWFields, description="AdamW for the rest.")
    kept: ClassVar = (*MOMENTS, *MOMENTUM)
    matrix_state: ClassVar = 1

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        """Both in one optimizer, for every ZeRO stage."""
        from training.optimizers.orthogonal import MuonWithAdamW

        named = list(named)
        matrices = [(name, parameter) for name, parameter in named if of_a_block(name, parameter)]
        group = {
            "params": [parameter for _, parameter in matrices],
            "names": tuple(name for name, _ in matrices),
            "state": MOMENTUM,
            "lr": self.lr,
            "initial_lr": self.lr,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "iteration": self.iteration,
        }
        rest = self.rest.groups((name, parameter) for name, parameter in named if not of_a_block(name, parameter))
        return MuonWithAdamW([group, *rest])
