"""What a step tells of its loss: in all, by part, by modality, by eighths of each modality's timesteps, and by subset.

A person asks which noise a model fails at, so the loss of a modality is also the mean over the samples whose timestep lies in an
eighth of 1 .. N, of which the first are nearly clean and the last nearly noise. All sums and counts of a step are one vector on
the device, which goes through the one all-reduce that a step has anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unidiffuser.modalities import Modality, all_parts
from unidiffuser.objective import JointObjective

EIGHTHS = 8
# By name, a sum and how many it is the sum of.
Sums = dict[str, tuple[float, float]]


class Losses:
    """Packs the losses of batches into vectors that can be added up over batches and workers, and names what comes out.

    Args:
        objective: whose losses they are.
        steps: N of the noise schedule.
        device: of the batches.
        subsets: names, where they have weights.

    Attributes:
        size: length of a vector.
    """

    def __init__(self, objective: JointObjective, steps: int, device: torch.device, subsets: Sequence[str] = ()) -> None:
        self.objective, self.modalities, self.steps, self.subsets = objective, objective.modalities, steps, subsets
        self.parts = [part.name for part in all_parts(self.modalities)]
        self.eighths, self.numbers = torch.arange(EIGHTHS, device=device), torch.arange(len(subsets), device=device)
        self.size = 1 + len(self.parts) + 2 * EIGHTHS * len(self.modalities) + 2 * len(subsets)
        self.shares = {modality.name: _shares(modality) for modality in self.modalities}

    def pack(
        self,
        loss: Tensor,
        parts: Mapping[str, Tensor],
        errors: Mapping[str, Tensor],
        timesteps: Mapping[str, Tensor],
        subset: Tensor,
        count: float,
    ) -> Tensor:
        """The losses of a batch, (size,) fp32.

        Args:
            loss, parts, errors: of `JointObjective.mean` and `JointObjective.errors`.
            timesteps: (B,) by modality.
            subset: (B,) numbers in `subsets`; not read where there are none.
            count: how many times the means of this batch count.
        """
        found = [count * torch.stack([loss.detach(), *(parts[name] for name in self.parts)])]
        for modality in self.modalities:
            shares = self.shares[modality.name]
            error = torch.stack([share * errors[name].detach() for name, share in shares.items()]).sum(0)
            found += _by((timesteps[modality.name] - 1) * EIGHTHS // self.steps, self.eighths, error)
        if self.subsets:
            found += _by(subset, self.numbers, self.objective.of_samples(errors).detach())
        return torch.cat(found)

    def unpack(self, numbers: Sequence[float], count: float) -> tuple[dict[str, float], Sums]:
        """Means of the loss, of each part and of each modality, and sums of eighths and subsets, from a sum of vectors.

        Args:
            numbers: the vectors' sum, (size,).
            count: the counts' sum.
        """
        names = ["loss", *(f"loss_{name}" for name in self.parts)]
        values = {name: number / count for name, number in zip(names, numbers, strict=False)}
        sums: Sums = {}
        rest = numbers[len(names) :]
        for number, modality in enumerate(self.modalities):
            # A modality of one part has that part's loss, and mostly its name.
            values[f"loss_{modality.name}"] = sum(
                share * values[f"loss_{name}"] for name, share in self.shares[modality.name].items()
            )
            totals, counts = (rest[(2 * number + i) * EIGHTHS :][:EIGHTHS] for i in range(2))
            for eighth, (total, seen) in enumerate(zip(totals, counts, strict=True)):
                sums[f"loss_{modality.name}_t{eighth + 1}"] = (total, seen)
        totals, counts = (rest[2 * EIGHTHS * len(self.modalities) + i * len(self.subsets) :] for i in range(2))
        for name, total, seen in zip(self.subsets, totals, counts, strict=False):
            sums[f"loss_data.{name}"] = (total, seen)
        return values, sums


def _by(kind: Tensor, kinds: Tensor, values: Tensor) -> list[Tensor]:
    """Sums of the values (B,) of each kind, and how many they are."""
    # A product with zeros and ones: scattered sums are added up in another order every time on a GPU.
    chosen = (kind[:, None] == kinds).float()
    return [values @ chosen, chosen.sum(0)]


def _shares(modality: Modality) -> dict[str, float]:
    """How much each part counts in the mean of its modality: by its weight in the loss, or all alike where none has any."""
    total = sum(part.weight for part in modality.parts)
    return {part.name: part.weight / total if total else 1 / len(modality.parts) for part in modality.parts}
