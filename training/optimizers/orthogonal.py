"""Muon where DeepSpeed's ZeRO has cut the matrices into flat vectors, which torch.optim.Muon does not take.

DeepSpeed has a Muon of its own, which puts the orthogonalised update in the gradient's place: gradient clipping then measures and
cuts the update instead of the gradient. Here the momentum is kept flat, like AdamW's moments, and only its sum with the gradient
is put together again: a matrix that lies on one worker is orthogonalised there, one that several share on one of them in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.arithmetic import all_have_bf16

# Quintic Newton-Schulz iteration, with the coefficients and the number of steps of torch.optim.Muon.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-7
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Numbers of matrices of one shape that are orthogonalised together. Small ones take half the time so, and large ones go alone.
TOGETHER = 2**20


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices (k, n, m) with their singular values brought near 1, between about 0.7 and 1.2; computed and given in `dtype`.

    The same operations in the same order as in torch.optim.Muon.
    """
    a, b, c = COEFFICIENTS
    high = matrices.shape[1] > matrices.shape[2]
    wide = matrices.to(dtype, copy=True)
    if high:
        wide = wide.mT
    wide.div_(torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=EPSILON))
    for _ in range(STEPS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if high else wide


@dataclass(frozen=True)
class Piece:
    """This worker's piece of a matrix.

    Attributes:
        shape: of the whole matrix.
        vector: the optimizer's parameter that holds the piece, on all workers the one of the same place.
        vector_start: where the piece starts in it.
        start: where the piece starts in the flat matrix.
        length: numbers of the piece; 0 where this worker has none of it.
        shared: whether other workers have other pieces of it.
    """

    shape: torch.Size
    vector: Tensor
    vector_start: int
    start: int
    length: int
    shared: bool

    def of(self, vectors: Mapping[Tensor, Tensor]) -> Tensor:
        """The piece, (length,), as a view of what stands for its vector."""
        return vectors[self.vector].view(-1).narrow(0, self.vector_start, self.length)


class MuonWithAdamW(torch.optim.AdamW):
    """Muon for the groups that have `momentum`, AdamW for the others. `lay_out` must be called before the first step."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, fused=True)
        self.pieces: dict[str, Piece] = {}
        self.types = TYPES

    def lay_out(self, pieces: dict[str, Piece]) -> None:
        """Tell where the matrices lie, by name; the same names in the same order on all workers, which must all call it."""
        self.pieces = pieces
        # Workers send each other what they have orthogonalised, so all compute in the same. (ZeRO 3 has emptied the groups.)
        device = next(iter(pieces.values())).vector.device
        self.types = TYPES | {"auto": TYPES["bf16" if all_have_bf16(device) else "fp32"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of the groups that are there: ZeRO hands over one group, or one vector of it, at a time."""
        groups = self.param_groups
        for group in groups:
            if "momentum" in group:
                self._orthogonal_step(group)
            else:
                self.param_groups = [group]
                super().step()
        self.param_groups = groups

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        owners = [owner for owner in group["params"] if owner.grad is not None]
        if not owners:
            return
        grads = [owner.grad for owner in owners]
        momenta = [self.state[owner].setdefault("momentum_buffer", torch.zeros_like(owner)) for owner in owners]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = dict(zip(owners, torch._foreach_lerp(grads, momenta, group["momentum"]), strict=True))
        here = [self.pieces[name] for name in group["names"] if self.pieces[name].vector in updates]
        dtype = self.types[group["iteration"]]
        for alike in _alike(piece for piece in here if piece.length and not piece.shared):
            matrices = [piece.of(updates).view(piece.shape) for piece in alike]
            torch._foreach_copy_(matrices, orthogonalised(torch.stack(matrices), dtype).unbind())
            torch._foreach_mul_(matrices, _size(alike[0]))
        shared, world = [piece for piece in here if piece.shared], dist.get_world_size()
        for first in range(0, len(shared), world):
            _orthogonalise_together(shared[first : first + world], updates, dtype)
        torch._foreach_mul_(owners, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(owners, list(updates.values()), alpha=-group["lr"])


def _alike(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Whole matrices in lists of one shape, each of `TOGETHER` numbers at most or of one matrix."""
    by_shape: dict[torch.Size, list[Piece]] = {}
    for piece in pieces:
        by_shape.setdefault(piece.shape, []).append(piece)
    for shape, alike in by_shape.items():
        size = max(1, TOGETHER // shape.numel())
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _size(piece: Piece) -> float:
    """What an orthogonalised matrix is multiplied by to have the size that AdamW's updates have."""
    return 0.2 * math.sqrt(max(piece.shape))


def _put(piece: Piece, updates: Mapping[Tensor, Tensor], matrix: Tensor) -> None:
    """Put this worker's piece of an orthogonalised matrix into the update."""
    own = matrix.reshape(-1)[piece.start : piece.start + piece.length]
    piece.of(updates).copy_(own).mul_(_size(piece))


def _orthogonalise_together(pieces: Sequence[Piece], updates: Mapping[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Orthogonalise as many matrices as there are workers, or fewer, each on one of them."""
    rank, mine = dist.get_rank(), None
    for home, piece in enumerate(pieces):
        whole = piece.vector.new_zeros(piece.shape.numel(), dtype=torch.float32)
        whole[piece.start : piece.start + piece.length] = piece.of(updates)
        dist.reduce(whole, dst=home)
        if home == rank:
            mine = whole.view(piece.shape)
    result = orthogonalised(mine[None], dtype)[0].contiguous() if mine is not None else None
    for home, piece in enumerate(pieces):
        matrix = result if home == rank and result is not None else piece.vector.new_empty(piece.shape, dtype=dtype)
        dist.broadcast(matrix, src=home)
        _put(piece, updates, matrix)
