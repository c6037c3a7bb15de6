"""The noise schedule: scaled-linear betas, by default Stable Diffusion's, timesteps 1 to N, and 0 for clean data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from unidiffuser.noise import NoiseConfig


class NoiseSchedule(nn.Module):
    """x_t = sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) noise, for t = 0 .. N.

    ``alpha_bar`` has N + 1 entries and alpha_bar[0] = 1, so that t = 0 is the clean data and the formulas need no special
    case. diffusers' schedulers count from 0 instead: their ``alphas_cumprod[i]`` is ``alpha_bar[i + 1]``.
    """

    alpha_bar: Tensor

    def __init__(self, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> None:
        super().__init__()
        self.beta_start, self.beta_end, self.steps = beta_start, beta_end, steps
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)])
        self.register_buffer("alpha_bar", alpha_bar.float(), persistent=False)

    @classmethod
    def of(cls, config: NoiseConfig) -> NoiseSchedule:
        """The schedule that a configuration describes."""
        return cls(config.beta_start, config.beta_end)

    def evenly(self, steps: int) -> list[int]:
        """The ``steps`` + 1 timesteps from N to 1 that are spaced evenly, up to rounding, as diffusers' linspace has them."""
        return (np.linspace(0, self.steps - 1, steps + 1).round()[::-1].astype(int) + 1).tolist()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t (B, ...) from clean data and noise (B, ...) at timesteps (B,), or one timestep, in 0 .. N."""
        alpha_bar = self._at(t, x0)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) at timesteps (B,) in 1 .. N."""
        alpha_bar = self.alpha_bar.to(t.device)[t]
        return alpha_bar / (1 - alpha_bar)

    def _at(self, t: Tensor | int, like: Tensor) -> Tensor:
        alpha_bar = self.alpha_bar.to(like.device)[torch.as_tensor(t, device=like.device).long()]
        return alpha_bar.expand(like.shape[0]).reshape(-1, *[1] * (like.dim() - 1))
