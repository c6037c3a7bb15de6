"""The matrix products inside a piece of work, counted and run again alone: how fast the machine could do its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unidiffuser import linear

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """A matrix product ``(batch, m, k) @ (batch, k, n)``; an operand is transposed if its columns lie contiguous in memory."""

    batch: int
    m: int
    k: int
    n: int
    a_transposed: bool = False
    b_transposed: bool = False

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.m * self.k * self.n


class Products(TorchDispatchMode):
    """Records the matrix products of everything that runs inside, in order.

    Linear layers, attention, and convolutions whose patches do not overlap, forward and backward. Attention's backward pass
    counts five products, as ``torch.utils.flop_counter`` does: the scores are computed again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        products = _PRODUCTS.get(func.overloadpacket if hasattr(func, "overloadpacket") else func)
        if products is not None:
            self.found += products(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _transposed(matrix: Tensor) -> bool:
    return matrix.stride(-2) == 1 and matrix.shape[-2] > 1


def _mm(a: Tensor, b: Tensor, **_: Any) -> list[Product]:
    return [Product(1, a.shape[0], a.shape[1], b.shape[1], _transposed(a), _transposed(b))]


def _bmm(a: Tensor, b: Tensor, **_: Any) -> list[Product]:
    return [Product(a.shape[0], a.shape[1], a.shape[2], b.shape[2], _transposed(a), _transposed(b))]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> list[Product]:
    batch, rows, columns = math.prod(query.shape[:2]), query.shape[2], key.shape[2]
    scores = Product(batch, rows, query.shape[3], columns, b_transposed=True)
    return [scores, Product(batch, rows, columns, value.shape[3])]


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> list[Product]:
    batch, rows, columns, width, out = math.prod(query.shape[:2]), query.shape[2], key.shape[2], query.shape[3], value.shape[3]
    return [
        Product(batch, rows, width, columns, b_transposed=True),  # the scores again
        Product(batch, rows, out, columns, b_transposed=True),  # their gradient
        Product(batch, columns, rows, out, a_transposed=True),  # gradient of the values
        Product(batch, rows, columns, width),  # of the queries
        Product(batch, columns, rows, width, a_transposed=True),  # of the keys
    ]


def _patches(images: Tensor, weight: Tensor) -> tuple[int, int, int]:
    patch = weight.shape[2] * weight.shape[3]
    return images.shape[0] * images.shape[2] * images.shape[3] // patch, weight.shape[1] * patch, weight.shape[0]


def _convolution(images: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Product]:
    return [Product(1, *_patches(images, weight), b_transposed=True)]


def _convolution_backward(_: Tensor, images: Tensor, weight: Tensor, *rest: Any, **__: Any) -> list[Product]:
    rows, inner, outer = _patches(images, weight)
    of_images, of_weight, _of_bias = rest[-1]
    gradients = [Product(1, rows, outer, inner)] * of_images
    return gradients + [Product(1, outer, rows, inner, a_transposed=True)] * of_weight


_PRODUCTS: dict[Any, Callable[..., list[Product]]] = {
    aten.mm: _mm,
    aten.addmm: lambda _bias, a, b, **_: _mm(a, b),
    aten.bmm: _bmm,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
}


@contextmanager
def recorded() -> Iterator[Products]:
    """Records what runs inside, with all linear layers as torch's own products."""
    with patch.object(linear, "ONEDNN", False), Products() as recorder:
        yield recorder


def replay(products: list[Product], dtype: torch.dtype, device: torch.device, onednn: bool = False) -> Callable[[], None]:
    """What runs ``products`` one after the other on random numbers; products of one shape share their memory.

    Args:
        onednn: run those of two matrices as ``unidiffuser.linear`` does where that is faster, not as ``torch.matmul`` does.
    """

    def matrix(batch: int, rows: int, columns: int, transposed: bool) -> Tensor:
        shape = (batch, columns, rows) if transposed else (batch, rows, columns)
        drawn = torch.randn(shape, dtype=dtype, device=device)
        return (drawn.mT if transposed else drawn).squeeze(0)

    calls = {}
    for product in set(products):
        a = matrix(product.batch, product.m, product.k, product.a_transposed)
        b = matrix(product.batch, product.k, product.n, product.b_transposed)
        if onednn and product.batch == 1:
            calls[product] = partial(linear.onednn_linear, a, b.mT, None)
        else:
            calls[product] = partial(torch.matmul, a, b, out=torch.empty_like(a @ b))

    def run() -> None:
        for product in products:
            calls[product]()

    return run
