"""Guidance without null tokens: the network's own marginals are the unconditional model.

arXiv 2303.06555 section 4.3. With scale s and T the last timestep, for drawing x given y and for drawing both,

    eps_x = (1 + s) eps_x(x_t, y, t, 0)          - s eps_x(x_t, noise, t, T)
    eps   = (1 + s) [eps_x, eps_y](x_t, y_t, t, t) - s [eps_x(x_t, noise, t, T), eps_y(noise, y_t, T, t)]

so a scale of 0 is no guidance, and c + s (c - u) is the form for all. Generalised to any modalities: every drawn modality
is pushed away from its marginal, in which all other modalities are noise.

A guided prediction is no longer the noise of any one distribution, so where sampling ends depends on the way: the
deterministic samplers agree, one that adds noise at every step ends elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unidiffuser.modalities import Modality
from unidiffuser.tasks import Task

# Beyond this a sample is a poster of a few colours, and half precision overflows soon.
MOST_GUIDANCE = 100.0


def check_interval(interval: tuple[int, int] | None, last: int) -> None:
    """Raise ValueError unless ``interval`` is None or two timesteps in 0 .. ``last``, the lower one first."""
    if interval is not None and not 0 <= interval[0] <= interval[1] <= last:
        raise ValueError(f"guidance_interval must be two timesteps in 0 .. {last}, the lower one first, not {interval}")


class GuidedNoise:
    """The guided noise prediction of the drawn parts, one batched network call a step.

    Args:
        model: called as ``model(x, t)`` or ``model(x, t, data_type)``, like ``UViT``.
        given: the parts of given modalities, noised to ``given_t``, each (B, *shape).
        given_t: timestep of the given modalities; 0 trusts them fully, ``last`` leaves them out.
        noise: pure noise for all parts, which stands in for modalities that are left out. It is drawn once and stays, so that
            sampling is a deterministic map of the starting noise.
        scale: guidance scale s, 0 for none.
        interval: guide only at timesteps from the first to the second, both included (arXiv 2404.07724); None guides always.
            Steps outside cost only the conditional part of the call.
        last: timestep of pure noise.
    """

    def __init__(
        self,
        model: nn.Module,
        modalities: Sequence[Modality],
        task: Task,
        given: Mapping[str, Tensor],
        given_t: int,
        noise: Mapping[str, Tensor],
        scale: float,
        interval: tuple[int, int] | None,
        last: int,
        data_type: int | None,
    ) -> None:
        self.model, self.modalities, self.task = model, modalities, task
        self.given, self.given_t, self.noise = given, given_t, noise
        self.scale, self.interval, self.last, self.data_type = scale, interval, last, data_type
        self.guidable = scale != 0 and (len(task.sample) > 1 or len(task.given) > 0)
        self.calls = 0

    def __call__(self, x: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
        """Noise in the drawn parts ``x`` (B, *shape) at timestep ``t`` in 1 .. last."""
        branches: list[tuple[str, ...]] = [(*self.task.sample, *self.task.given)]
        if self.guidable and (self.interval is None or self.interval[0] <= t <= self.interval[1]):
            branches += [(name,) for name in self.task.sample]
        predicted = self._predict(x, t, branches)
        conditional = {name: predicted[name][0] for name in x}
        if len(branches) == 1:
            return conditional
        owner = {part.name: modality.name for modality in self.modalities for part in modality.parts}
        guided = {}
        for name, c in conditional.items():
            u = predicted[name][1 + self.task.sample.index(owner[name])]
            guided[name] = c + self.scale * (c - u)
        return guided

    def _predict(self, x: Mapping[str, Tensor], t: int, branches: list[tuple[str, ...]]) -> dict[str, Tensor]:
        """Predictions (branches, B, *shape) by part; a branch names the modalities that are not left out."""
        batch, device = next((len(part), part.device) for part in x.values())
        parts: dict[str, Tensor] = {}
        times: dict[str, Tensor] = {}
        for modality in self.modalities:
            drawn = modality.name in self.task.sample
            present = [modality.name in branch for branch in branches]
            own = t if drawn else self.given_t
            times[modality.name] = torch.tensor(
                [own if here else self.last for here in present], device=device
            ).repeat_interleave(batch)
            for part in modality.parts:
                source = x if drawn else self.given
                parts[part.name] = torch.cat([(source if here else self.noise)[part.name] for here in present])
        self.calls += 1
        out = self.model(parts, times) if self.data_type is None else self.model(parts, times, self.data_type)
        return {name: out[name].float().unflatten(0, (len(branches), batch)) for name in x}
