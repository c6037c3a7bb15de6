"""ERA-Solver: an Adams solver that trusts the network's earlier predictions where the later ones look wrong (arXiv 2301.12935).

A step is DDIM's, with the noise of the implicit Adams method of fourth order:

    noise = (9 predicted_{i+1} + 19 noise_i - 5 noise_{i-1} + noise_{i-2}) / 24

The noise at the end of the step is not known yet. It is predicted by the Lagrange polynomial through ``BASES`` of the network's
earlier predictions. Which ones depends on the error: how far the noise predicted for this place was from what the network then
said. After a small error these are the latest ones. At ``TOLERANCE`` they are spread over the whole way, and beyond it they lie
near its beginning, where networks err less. Each sample chooses for itself, so that it does not depend on its batch.

The error is a root mean square, where the paper has a norm that grows with the size of the pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unidiffuser.schedule import NoiseSchedule

BASES = 4
# The error at which the bases are spread evenly.
TOLERANCE = 0.05


class EraScheduler:
    """One draw of ``steps`` calls, in the manner of diffusers' schedulers; states are (B, numbers)."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def set_timesteps(self, steps: int) -> None:
        self.path = self.schedule.evenly(steps)
        self.timesteps = torch.tensor(self.path[:-1]) - 1
        self.seen: list[Tensor] = []
        self.predicted: Tensor | None = None

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        """The state one step on; ``timestep`` counts from 0, as diffusers does."""
        self.seen.append(model_output)
        here = len(self.seen) - 1
        noise = model_output
        if len(self.seen) >= BASES:
            self.predicted = self._predict(here)
            noise = (9 * self.predicted + 19 * self.seen[-1] - 5 * self.seen[-2] + self.seen[-3]) / 24
        now, then = (self.schedule.alpha_bar[t].double().cpu() for t in self.path[here : here + 2])
        x0 = (sample - (1 - now).sqrt() * noise) / now.sqrt()
        return (then.sqrt() * x0 + (1 - then).sqrt() * noise,)

    def _predict(self, here: int) -> Tensor:
        """The noise at the end of the step from place ``here``, (B, numbers)."""
        error = torch.full((len(self.seen[-1]),), TOLERANCE, device=self.seen[-1].device)
        if self.predicted is not None:
            error = (self.seen[-1] - self.predicted).square().mean(1).sqrt()
        bases = chosen(here, error / TOLERANCE)
        places = torch.tensor(self.path, dtype=torch.float64, device=bases.device)
        weights = lagrange(places[bases], places[here + 1])
        noise = torch.zeros_like(self.seen[-1])
        for place in bases.unique().tolist():
            noise += (weights * (bases == place)).sum(1, keepdim=True).float() * self.seen[place]
        return noise


def chosen(last: int, error: Tensor) -> Tensor:
    """The places of the bases in 0 .. ``last``, (B, BASES), different ones in rising order; ``last`` is always one.

    Args:
        error: of the sample's latest prediction in units of the tolerance, (B,).
    """
    even = torch.arange(1, BASES + 1, device=error.device) / BASES
    wanted = (last * even ** error[:, None]).floor().long()
    places = [wanted[:, 0].clamp(max=last - BASES + 1)]
    for m in range(1, BASES):
        places.append(torch.maximum(wanted[:, m].clamp(max=last - BASES + 1 + m), places[-1] + 1))
    return torch.stack(places, dim=1)


def lagrange(bases: Tensor, at: Tensor) -> Tensor:
    """Weights (B, n) of the values at ``bases`` (B, n) in the polynomial through them, taken at ``at``."""
    gaps = bases[:, :, None] - bases[:, None, :]
    ratios = (at - bases)[:, None, :] / gaps
    own = torch.eye(bases.shape[1], dtype=torch.bool, device=bases.device)
    return ratios.masked_fill(own, 1.0).prod(2)
