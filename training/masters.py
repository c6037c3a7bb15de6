"""The fp32 numbers that DeepSpeed shards over the workers, seen by the name of the parameter.

ZeRO gives every worker some flat fp32 vectors: its share of the master weights. The moments of Adam and the moving average
of the weights are vectors of the same shape beside them. `Masters` turns any such set of vectors into whole named tensors
and back, for every ZeRO stage and every number of workers. That is why a checkpoint written by four workers with ZeRO 2
can be resumed by one with ZeRO 3: DeepSpeed's own universal checkpoints cannot do this (0.19.8 resumes ZeRO 3 wrongly).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class Stretch(NamedTuple):
    """Where this worker's piece of a parameter lies: vector, start in it, start in the flat parameter, length."""

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
        self.places: dict[str, Stretch | None]
        # What is frozen has no master weights.
        self.named = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
        self.shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in self.named}
        zero = engine.optimizer
        if zero_stage == 0:
            self.vectors = [parameter.detach().view(-1) for _, parameter in self.named]
            self._owners = [parameter for _, parameter in self.named]
            self.optimizer: torch.optim.Optimizer = zero
            self.places = {name: Stretch(i, 0, 0, p.numel()) for i, (name, p) in enumerate(self.named)}
        elif zero_stage == 3:
            self._owners = self.vectors = list(zero.fp32_partitioned_groups_flat)
            self.optimizer = zero.optimizer
            self.places = {name: self._sharded_place(zero, parameter) for name, parameter in self.named}
        else:
            self._owners = self.vectors = list(zero.single_partition_of_fp32_groups)
            self.optimizer = zero.optimizer
            self.places = {name: self._fragment_place(parameter) for name, parameter in self.named}
        self.replicated = zero_stage == 0

    @staticmethod
    def _fragment_place(parameter: Any) -> Stretch | None:
        """ZeRO 1 and 2: the flat concatenation of all parameters is cut in equal partitions."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Stretch(mapping.param_group_index, high.start, low.start, high.numel)

    @staticmethod
    def _sharded_place(zero: Any, parameter: Any) -> Stretch | None:
        """ZeRO 3: every parameter is cut in equal partitions, the last one padded."""
        group, start, length = zero.grad_position[zero.get_param_id(parameter)]
        parameter_start = dist.get_rank() * length
        length = min(length, parameter.ds_numel - parameter_start)
        return Stretch(group, start, parameter_start, length) if length > 0 else None

    @torch.no_grad()
    def gather(self, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole fp32 tensors on the CPU by name, on rank 0; empty on the others. All workers must call it."""
        gathered = {}
        for name, _ in self.named:
            place, shape = self.places[name], self.shapes[name]
            whole = torch.zeros(shape.numel(), dtype=torch.float32, device=self.vectors[0].device)
            if place is not None and (dist.get_rank() == 0 or not self.replicated):
                end = place.parameter_start + place.length
                whole[place.parameter_start : end] = vectors[place.vector].view(-1).narrow(0, place.start, place.length)
            dist.reduce(whole, dst=0)
            if dist.get_rank() == 0:
                gathered[name] = whole.view(shape).cpu()
        return gathered

    @torch.no_grad()
    def scatter(self, read: Callable[[str], Tensor], vectors: Sequence[Tensor]) -> None:
        """Fill vectors in place with this worker's share of the whole tensors that `read` gives by name."""
        for name, _ in self.named:
            place = self.places[name]
            if place is not None:
                piece = read(name).reshape(-1)[place.parameter_start : place.parameter_start + place.length]
                vectors[place.vector].view(-1).narrow(0, place.start, place.length).copy_(piece)

    def empty(self) -> list[Tensor]:
        """Zero vectors of the shapes of this worker's share."""
        return [torch.zeros_like(vector, dtype=torch.float32).detach() for vector in self.vectors]

    def moments(self, name: str) -> list[Tensor]:
        """Adam's moment `exp_avg` or `exp_avg_sq`, the optimizer's own tensors; there after the first step."""
        return [self.optimizer.state[owner][name] for owner in self._owners]

    def set_moments(self, moments: dict[str, list[Tensor]], steps: int) -> None:
        """Give Adam its moments and the number of steps that it has taken."""
        for index, owner in enumerate(self._owners):
            # A step tensor of its own for every vector: shared ones are counted up once for each vector.
            self.optimizer.state[owner] = {
                "step": torch.tensor(float(steps), dtype=torch.float32, device=owner.device),
                **{name: vectors[index].view_as(owner) for name, vectors in moments.items()},
            }
