"""Ancestral sampling with the best variance of each step: Analytic-DPM (arXiv 2201.06503, theorem 1).

A step from timestep t to an earlier s draws x_s from a Gaussian. Its mean is DDPM's. Its best variance, as an isotropic one, is

    sigma^2 = lambda^2 + (sqrt(abar_s) - sqrt((1 - abar_s - lambda^2) abar_t / (1 - abar_t)))^2 (1 - abar_t) / abar_t (1 - Gamma)

with lambda^2 = (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s), the variance given x_0, and Gamma = E |E[noise | x_t]|^2 / d.
The rest is what x_0 itself is uncertain by. Without it, few steps lose that much of the samples' spread.

The paper takes Gamma from a table over a data set. Here it is the mean square of the noise predicted for this sample, as in the
authors' code for Stable Diffusion: over the thousands of numbers of a latent it is the same figure, and it needs no pass over
data for each task and condition. Every part has its own, since pictures and texts are not equally certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from unidiffuser.schedule import NoiseSchedule


def optimal_variance(now: Tensor, then: Tensor, gamma: Tensor) -> Tensor:
    """The best variance of a step.

    Args:
        now, then: alpha_bar where the step begins, and where it ends.
        gamma: mean square of the expected noise, of any shape; what is above 1 counts as 1.
    """
    least = (1 - then) / (1 - now) * (1 - now / then)
    slope = then.sqrt() - ((1 - then - least) * now / (1 - now)).sqrt()
    return least + slope**2 * (1 - now) / now * (1 - gamma).clamp(min=0)


class AnalyticScheduler:
    """One draw of ``steps`` calls, in the manner of diffusers' schedulers.

    Args:
        sizes: numbers of each part; states hold the parts side by side, (B, sum of sizes).
    """

    def __init__(self, schedule: NoiseSchedule, sizes: Sequence[int]) -> None:
        self.schedule, self.sizes = schedule, list(sizes)

    def set_timesteps(self, steps: int) -> None:
        path = self.schedule.evenly(steps)
        self.timesteps = torch.tensor(path[:-1]) - 1
        self.following = dict(pairwise(path))

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, *, variance_noise: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        """The state (B, numbers) one step on; ``timestep`` counts from 0, as diffusers does."""
        t = timestep + 1
        now, then = self.schedule.alpha_bar[t].double().cpu(), self.schedule.alpha_bar[self.following[t]].double().cpu()
        x0 = (sample - (1 - now).sqrt() * model_output) / now.sqrt()
        kept = (now / then).sqrt() * (1 - then) / (1 - now)
        mean = then.sqrt() * (1 - now / then) / (1 - now) * x0 + kept * sample
        spread = torch.cat([self._spread(part, now, then) for part in model_output.split(self.sizes, dim=1)], dim=1)
        return (mean + spread * variance_noise,)

    @staticmethod
    def _spread(noise: Tensor, now: Tensor, then: Tensor) -> Tensor:
        """Standard deviation of the step for one part, (B, numbers)."""
        gamma = noise.square().mean(1, keepdim=True)
        return optimal_variance(now, then, gamma).sqrt().expand_as(noise)
