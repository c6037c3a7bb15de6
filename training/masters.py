"""The fp32 numbers that DeepSpeed shards over the workers, seen by the name of the parameter.

ZeRO gives every worker some flat fp32 vectors: its share of the master weights. What the optimizer keeps of each weight and the
moving average of the weights are vectors of the same shape beside them. `Masters` says which pieces of which named tensors such
vectors hold, for every ZeRO stage and every number of workers. That is why a checkpoint written by four workers with ZeRO 2
can be resumed by one with ZeRO 3: DeepSpeed's own universal checkpoints cannot do this (0.19.8 resumes ZeRO 3 wrongly).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from training.optimizers.orthogonal import MuonWithAdamW, Piece

Read = Callable[[str, int, int], Tensor]
# Numbers that change places at once: what is held twice meanwhile.
EXCHANGED = 2**24


class Stretch(NamedTuple):
    """Where this worker's piece of a parameter lies: vector, start in it, start in the flat parameter, length (0 if none)."""

    vector: int
    start: int
    parameter_start: int
    length: int


class Masters:
    """This worker's share of the master weights of a DeepSpeed engine.

    Attributes:
        vectors: the flat fp32 master weights of this worker, the engine's own tensors.
        optimizer: the torch optimizer that updates them.
    """

    def __init__(self, engine: Any, zero_stage: int) -> None:
        self.places: dict[str, Stretch]
        self.engine, self.zero_stage = engine, zero_stage
        # What is frozen has no master weights.
        self.named = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
        self.shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in self.named}
        zero = engine.optimizer
        self.optimizer: torch.optim.Optimizer = zero if zero_stage == 0 else zero.optimizer
        group_of = {name: number for number, group in enumerate(self.optimizer.param_groups) for name in group["names"]}
        if zero_stage == 0:
            self.vectors = [parameter.detach().view(-1) for _, parameter in self.named]
            self._owners = [parameter for _, parameter in self.named]
            self.places = {name: Stretch(i, 0, 0, p.numel()) for i, (name, p) in enumerate(self.named)}
        elif zero_stage == 3:
            self._owners = self.vectors = list(zero.fp32_partitioned_groups_flat)
            self.places = {name: self._sharded_place(zero, parameter) for name, parameter in self.named}
        else:
            self._owners = self.vectors = list(zero.single_partition_of_fp32_groups)
            self.places = {name: self._fragment_place(parameter, group_of[name]) for name, parameter in self.named}
        self.replicated = zero_stage == 0
        # Every vector holds parameters of one group, and so has one kind of state.
        kept = {name: self.optimizer.param_groups[number]["state"] for name, number in group_of.items()}
        self._kept_of_vector = {self.places[name].vector: kept[name] for name, _ in self.named}
        self.kept = {name: kept[name] for name, _ in self.named}
        if isinstance(self.optimizer, MuonWithAdamW):
            self.optimizer.lay_out(self._pieces())

    @staticmethod
    def _fragment_place(parameter: Any, group: int) -> Stretch:
        """ZeRO 1 and 2: the flat concatenation of all parameters of a group is cut in equal partitions."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return Stretch(group, 0, 0, 0)
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Stretch(group, high.start, low.start, high.numel)

    @staticmethod
    def _sharded_place(zero: Any, parameter: Any) -> Stretch:
        """ZeRO 3: every parameter is cut in equal partitions, the last one padded."""
        group, start, length = zero.grad_position[zero.get_param_id(parameter)]
        parameter_start = dist.get_rank() * length
        length = min(length, parameter.ds_numel - parameter_start)
        return Stretch(group, start, parameter_start, length) if length > 0 else Stretch(group, 0, 0, 0)

    def _pieces(self) -> dict[str, Piece]:
        """This worker's pieces of all parameters, for an optimizer that needs whole ones; all workers must call it."""
        pieces = {}
        for name, _ in self.named:
            vector, start, parameter_start, length = self.places[name]
            shape = self.shapes[name]
            pieces[name] = Piece(shape, self._owners[vector], start, parameter_start, length, shared=False)
        if self.replicated:
            return pieces
        # A matrix is whole where a worker has all of it, and nobody asks the workers that have nothing.
        alone: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(alone, {name for name, piece in pieces.items() if piece.length == piece.shape.numel()})
        return {name: replace(piece, shared=name not in set().union(*alone)) for name, piece in pieces.items()}

    def owned(self, names: Sequence[str]) -> Iterator[tuple[str, Stretch]]:
        """Which pieces of these parameters this worker writes: its share, or, where all have everything, an equal part of it."""
        rank, world, before = dist.get_rank(), dist.get_world_size(), 0
        total = sum(self.shapes[name].numel() for name in names)
        first, last = total * rank // world, total * (rank + 1) // world
        for name in names:
            place = self.places[name]
            if self.replicated:
                start, end = max(first - before, 0), min(last - before, place.length)
                before += place.length
                place = Stretch(place.vector, start, start, max(0, end - start))
            if place.length:
                yield name, place

    @torch.no_grad()
    def gather(self, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole fp32 tensors on the CPU by name, on rank 0; empty on the others. All workers must call it."""
        gathered = {}
        for name, shape in self.shapes.items():
            place = self.places[name]
            whole = torch.zeros(shape.numel(), dtype=torch.float32, device=self.engine.device)
            if place.length and (dist.get_rank() == 0 or not self.replicated):
                end = place.parameter_start + place.length
                whole[place.parameter_start : end] = vectors[place.vector].view(-1).narrow(0, place.start, place.length)
            dist.reduce(whole, dst=0)
            if dist.get_rank() == 0:
                gathered[name] = whole.view(shape).cpu()
        return gathered

    @torch.no_grad()
    def scatter(self, read: Read, vectors: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
        """Fill vectors in place with this worker's share of tensors.

        Args:
            read: (name, start, length) -> so many numbers of the flattened tensor from `start` on.
            names: of the parameters wanted; all if None.
        """
        for name in self.shapes if names is None else names:
            place = self.places[name]
            if place.length:
                piece = read(name, place.parameter_start, place.length)
                vectors[place.vector].view(-1).narrow(0, place.start, place.length).copy_(piece)

    @contextmanager
    def computing_with(self, vectors: Sequence[Tensor]) -> Iterator[None]:
        """Compute with other weights, while here, which lie in the masters' place and the masters in theirs; all workers must."""
        self._exchange(vectors)
        try:
            yield
        finally:
            self._exchange(vectors)

    @torch.no_grad()
    def _exchange(self, vectors: Sequence[Tensor]) -> None:
        for master, other in zip(self.vectors, vectors, strict=True):
            for one, two in zip(master.detach().view(-1).split(EXCHANGED), other.view(-1).split(EXCHANGED), strict=True):
                kept = one.clone()
                one.copy_(two)
                two.copy_(kept)
        zero = self.engine.optimizer
        if self.zero_stage == 3:
            # As DeepSpeed's own step: what forward passes have left gathered would be used again, with its old numbers.
            zero._partition_all_parameters()
            for group in range(len(self.vectors)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        elif self.zero_stage > 0:
            zero.update_lp_params()

    def empty(self) -> list[Tensor]:
        """Zero vectors of the shapes of this worker's share."""
        return [torch.zeros_like(vector, dtype=torch.float32).detach() for vector in self.vectors]

    @property
    def state_kinds(self) -> list[str]:
        """Names of the tensors that the optimizer keeps beside the weights, some of them of some parameters only."""
        return sorted({kind for kinds in self.kept.values() for kind in kinds})

    def having(self, kind: str) -> list[str]:
        """The parameters of which the optimizer keeps a kind of tensor."""
        return [name for name, kinds in self.kept.items() if kind in kinds]

    def state(self, kind: str) -> list[Tensor]:
        """One kind of the optimizer's own tensors by vector; zeros before the first step, and where it keeps no such tensor."""
        states = [self.optimizer.state.get(owner, {}) for owner in self._owners]
        return [
            state[kind] if kind in state else torch.zeros_like(vector) for state, vector in zip(states, self.vectors, strict=True)
        ]

    def set_state(self, tensors: dict[str, list[Tensor]], steps: int) -> None:
        """Give the optimizer its tensors, by kind and vector, and the number of steps that it has taken."""
        for index, owner in enumerate(self._owners):
            # A step tensor of its own for every vector: shared ones are counted up once for each vector.
            self.optimizer.state[owner] = {
                "step": torch.tensor(float(steps), dtype=torch.float32, device=owner.device),
                **{kind: tensors[kind][index].view_as(owner) for kind in self._kept_of_vector.get(index, ())},
            }
