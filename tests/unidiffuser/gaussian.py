"""A world in which everything is known: jointly Gaussian modalities, and their optimal noise predictor in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unidiffuser.modalities import Modality, Part, all_parts
from unidiffuser.schedule import NoiseSchedule

IMAGE_AND_TEXT = (
    Modality(name="image", parts=(Part(name="latent", shape=(1, 2, 2), patch=2), Part(name="clip", shape=(2,)))),
    Modality(name="text", parts=(Part(name="text", shape=(2, 2)),)),
)


class GaussianWorld(nn.Module):
    """Stands in for the network: E[noise | all noised parts, timesteps] for z ~ N(mean, covariance).

    z_t = A z + S noise with diagonal A and S, so the noise and z_t are jointly Gaussian and
    E[noise | z_t] = S (A C A + S^2)^-1 (z_t - A mean).
    """

    def __init__(self, modalities: tuple[Modality, ...], mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.modalities, self.mean, self.covariance = modalities, mean.double(), covariance.double()
        self.alpha_bar = NoiseSchedule().alpha_bar.double()
        self.rows_seen = 0

    @classmethod
    def random(cls, modalities: tuple[Modality, ...], seed: int = 0) -> GaussianWorld:
        generator = torch.Generator().manual_seed(seed)
        size = sum(torch.Size(part.shape).numel() for part in all_parts(modalities))
        root = torch.randn(size, size + 2, generator=generator, dtype=torch.float64) / size**0.5
        mean = torch.randn(size, generator=generator, dtype=torch.float64) * 0.7
        return cls(modalities, mean, root @ root.T + 0.05 * torch.eye(size))

    def forward(self, x: dict[str, Tensor], t: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = all_parts(self.modalities)
        z = torch.cat([x[part.name].flatten(1) for part in parts], 1).double()
        names = [modality.name for modality in self.modalities]
        times = torch.stack([t[name].expand(len(z)) for name in names], 1)
        codes = (times * torch.tensor([2000**k for k in range(len(names))])).sum(1)
        flat = torch.empty_like(z)
        for code in codes.unique():  # the samples of one call share two or three rows of timesteps
            here = codes == code
            row = times[here][0]
            alpha_bar = torch.cat([self.alpha_bar[k].expand(len(self.index(n))) for n, k in zip(names, row, strict=True)])
            a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
            total = a[:, None] * self.covariance * a + torch.diag(s**2)
            flat[here] = s * torch.linalg.solve(total, (z[here] - a * self.mean).T).T
        self.rows_seen += len(z)
        return self.split(flat)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        parts = all_parts(self.modalities)
        pieces = flat.split([torch.Size(part.shape).numel() for part in parts], dim=1)
        return {part.name: piece.reshape(-1, *part.shape) for part, piece in zip(parts, pieces, strict=True)}

    def flat(self, parts: dict[str, Tensor]) -> Tensor:
        """The given parts side by side, (B, numbers), in declared order."""
        return torch.cat([parts[p.name].flatten(1) for p in all_parts(self.modalities) if p.name in parts], 1).double()

    def index(self, *names: str) -> Tensor:
        """Where the numbers of modalities stand in the joint vector."""
        owners = [m.name for m in self.modalities for p in m.parts for _ in range(torch.Size(p.shape).numel())]
        return torch.tensor([i for i, owner in enumerate(owners) if owner in names])

    def draw(self, count: int, seed: int = 0) -> Tensor:
        """True samples (count, numbers)."""
        noise = torch.randn(count, len(self.mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.mean + noise @ torch.linalg.cholesky(self.covariance).T

    def marginal(self, *names: str) -> tuple[Tensor, Tensor]:
        """Mean (numbers,) and covariance of modalities together."""
        index = self.index(*names)
        return self.mean[index], self.covariance[index][:, index]

    def conditional(self, name: str, given: str | tuple[str, ...], value: Tensor, given_t: int = 0) -> tuple[Tensor, Tensor]:
        """Mean (B, numbers) and covariance of modality ``name``, given ``value`` (B, numbers) of ``given`` at ``given_t``."""
        i, j = self.index(name), self.index(*([given] if isinstance(given, str) else given))
        alpha_bar = self.alpha_bar[given_t]
        cross = alpha_bar.sqrt() * self.covariance[i][:, j]
        own = alpha_bar * self.covariance[j][:, j] + (1 - alpha_bar) * torch.eye(len(j))
        gain = cross @ torch.linalg.inv(own)
        mean = self.mean[i] + (value - alpha_bar.sqrt() * self.mean[j]) @ gain.T
        return mean, self.covariance[i][:, i] - gain @ cross.T
