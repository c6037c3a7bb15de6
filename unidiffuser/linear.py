"""Linear layers that use the whole width of a CPU's vectors.

torch multiplies fp32 matrices on x86 with MKL, which computes in vectors of 256 bits where the processor is not Intel's, however
wide that processor's own are. oneDNN, which torch brings along for its convolutions, does not ask who made them: on an AMD EPYC
with AVX-512 the same products take less than half the time. GPUs, half precision, Intel's processors and everything else
are left to torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mkl_is_narrow(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether torch's own fp32 products use half of what this processor has, and oneDNN is there to do better."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkl.is_available()
    return wide and torch.backends.mkldnn.is_available() and cpuinfo.exists() and "GenuineIntel" not in cpuinfo.read_text()


ONEDNN = mkl_is_narrow()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.numel() == 0:  # which oneDNN refuses
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# Operators of their own, because torch.compile takes oneDNN's only with weights that never change.
@torch.library.custom_op("unidiffuser::linear", mutates_args=(), device_types="cpu")
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` of fp32 tensors on a CPU, differentiable: x (..., k), weight (n, k), bias (n,) or None."""
    return _product(x, weight, bias)


@onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("unidiffuser::linear_weight_gradient", mutates_args=(), device_types="cpu")
def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """(n, k) from gradients (rows, n) and inputs (rows, k)."""
    # oneDNN reads its second matrix in any order and has the first copied: that should be the smaller one.
    if gradient.shape[1] > x.shape[1]:
        return _product(x.t(), gradient.t()).t().contiguous()
    return _product(gradient.t(), x.t())


@_weight_gradient.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((gradient.shape[1], x.shape[1]))


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    rows = gradient.reshape(-1, gradient.shape[-1])
    return (
        onednn_linear(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None,
        _weight_gradient(rows, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None,
        rows.sum(0) if ctx.needs_input_grad[2] else None,
    )


onednn_linear.register_autograd(_gradients, setup_context=_remember)


class Linear(nn.Linear):
    """``nn.Linear``, by oneDNN where that is the faster of torch's two ways: the same result, but for rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_features) from (..., in_features)."""
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        if ONEDNN and plain and not torch.is_autocast_enabled("cpu"):
            return onednn_linear(x, self.weight, self.bias)
        return super().forward(x)
