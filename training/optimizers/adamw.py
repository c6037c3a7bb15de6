"""AdamW over all parameters, as U-ViT trains them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from training.section import Section

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Named = list[tuple[str, "nn.Parameter"]]
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the weight of a linear or convolutional layer: no norm, no bias, and no table of embeddings."""
    # The shape is another one where ZeRO 3 has cut the parameter.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 2 and name.endswith(".weight") and "embedding" not in name


class AdamWFields(Section):
    """What AdamW takes, alone or for what another optimizer leaves to it."""

    lr: float = Field(2e-4, gt=0, le=1, description="Learning rate after the warm-up.")
    weight_decay: float = Field(0.03, ge=0, le=1, description="Decoupled weight decay.")
    decay: Literal["all", "matrices"] = Field(
        "all",
        description="What weight decay takes in: all parameters, as in the paper, or only matrices: no norms, biases and tables.",
    )
    betas: tuple[float, float] = Field((0.9, 0.9), description="Decay of the first and second moment.")

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; both must be in [0, 1)")
        return betas

    def groups(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """One group, or two if only matrices decay, without those that would be empty."""
        both: tuple[Named, Named] = ([], [])
        for name, parameter in named:
            both[self.decay == "matrices" and not is_matrix(name, parameter)].append((name, parameter))
        return [
            {
                "params": [parameter for _, parameter in members],
                "names": tuple(name for name, _ in members),
                "state": MOMENTS,
                "lr": self.lr,
                "initial_lr": self.lr,
                "betas": self.betas,
                "weight_decay": weight_decay,
            }
            for members, weight_decay in zip(both, (self.weight_decay, 0.0), strict=True)
            if members
        ]


class AdamW(AdamWFields):
    """AdamW, with the values of U-ViT."""

    kind: Literal["adamw"] = Field("adamw", description="AdamW for all parameters.")
    kept: ClassVar = MOMENTS
    matrix_state: ClassVar = 2

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        """torch's. Fused: one pass over the memory, and no temporaries of the parameters' size."""
        import torch

        return torch.optim.AdamW(self.groups(named), fused=True)
