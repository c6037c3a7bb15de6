"""Score heads: small networks that read one number (beauty, safety, a watermark) off a CLIP image embedding.

LAION's aesthetic predictor v2 is five Linear layers with dropout and nothing else between them, of widths 768, 1024, 128, 64, 16
and 1, on the normalised embedding of ViT-L/14 (github.com/christophschuhmann/improved-aesthetic-predictor); v1 is one Linear
layer (github.com/LAION-AI/aesthetic-predictor). Dropout does nothing at inference, so a head is its Linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from unidiffuser.tensors import WeightsError, read_tensors

Architecture = Literal["laion-aesthetic-v2", "linear", "mlp"]
Activation = Literal["none", "relu", "gelu"]
AESTHETIC_V2 = (768, 1024, 128, 64, 16, 1)
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
}


@dataclass(frozen=True)
class ScoreHead:
    """Linear layers with one activation between them, and a logistic function behind them when `sigmoid`.

    Attributes:
        layers: (weight, bias) pairs, weights (out, in) fp32.
        normalise: whether embeddings are brought to length 1 first.

    Example:
        >>> head = ScoreHead.load("sac+logos+ava1-l14-linearMSE.pth", "laion-aesthetic-v2")
        >>> head(clip.image(pictures))                              # (B, 768) -> (B,)
    """

    layers: tuple[tuple[Tensor, Tensor | None], ...]
    activation: Activation = "none"
    sigmoid: bool = False
    normalise: bool = True

    @classmethod
    def load(
        cls,
        path: Path | str,
        architecture: Architecture,
        activation: Activation = "none",
        sigmoid: bool = False,
        normalise: bool = True,
        device: str | torch.device = "cpu",
    ) -> ScoreHead:
        """Read a head's layers from a .safetensors file or a state dict (.pth, .pt, .bin); their sizes are the tensors' own.

        Raises:
            FileNotFoundError: there is no such file.
            WeightsError: the tensors are not those of Linear layers that end in one number, or not of this architecture.
        """
        layers = linear_layers(read_tensors(Path(path)), path)
        widths = (layers[0][0].shape[1], *(weight.shape[0] for weight, _ in layers))
        shown = " -> ".join(map(str, widths))
        if architecture == "laion-aesthetic-v2" and widths != AESTHETIC_V2:
            raise WeightsError(f"{path}: {shown} is not laion-aesthetic-v2 ({' -> '.join(map(str, AESTHETIC_V2))}); name it mlp")
        if architecture == "linear" and len(layers) != 1:
            raise WeightsError(f"{path}: {shown} is {len(layers)} layers, a linear head has one; name it mlp")
        if widths[-1] != 1:
            raise WeightsError(f"{path}: {shown} ends in {widths[-1]} numbers, expected one score")
        moved = tuple((weight.to(device), None if bias is None else bias.to(device)) for weight, bias in layers)
        return cls(moved, activation, sigmoid, normalise)

    @property
    def width(self) -> int:
        """D of the embeddings that it takes."""
        return int(self.layers[0][0].shape[1])

    @torch.inference_mode()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """Scores of (B, D) embeddings, (B,) fp32."""
        x = embeddings.float()
        if self.normalise:
            x = functional.normalize(x, dim=-1)
        for number, (weight, bias) in enumerate(self.layers):
            x = functional.linear(ACTIVATIONS[self.activation](x) if number else x, weight, bias)
        return (x.sigmoid() if self.sigmoid else x).squeeze(-1)


def linear_layers(state: dict[str, Tensor], source: object) -> list[tuple[Tensor, Tensor | None]]:
    """The (weight, bias) pairs of a state dict of Linear layers, in the numeric order of their names, fp32.

    Raises:
        WeightsError: there is a tensor of another kind of layer, or a layer does not fit the one before it.
    """
    names = sorted({name.rpartition(".")[0] for name in state}, key=_numerically)
    layers = []
    for name in names:
        prefix = f"{name}." if name else ""
        weight, bias = state.get(f"{prefix}weight"), state.get(f"{prefix}bias")
        known = {f"{prefix}weight", f"{prefix}bias"}
        own = {other: tensor for other, tensor in state.items() if other.rpartition(".")[0] == name}
        if weight is None or weight.dim() != 2 or own.keys() - known or (bias is not None and bias.shape != weight.shape[:1]):
            shapes = ", ".join(f"{other} {tuple(tensor.shape)}" for other, tensor in own.items())
            raise WeightsError(f"{source}: {shapes} is no Linear layer (weight and bias); a head has only these")
        layers.append((weight.float(), None if bias is None else bias.float()))
    for (before, _), (weight, _), name in zip(layers, layers[1:], names[1:], strict=False):
        if weight.shape[1] != before.shape[0]:
            raise WeightsError(f"{source}: {name} takes {weight.shape[1]} numbers, the layer before it gives {before.shape[0]}")
    if not layers:
        raise WeightsError(f"{source}: holds no tensors")
    return layers


def _numerically(name: str) -> list[tuple[int, str]]:
    """layers.10 comes after layers.2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
