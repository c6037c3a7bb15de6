"""The picture codec: a small convolutional autoencoder, trained first and then frozen, from (3, 64, 64) to (8, 8, 8) and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from examples.shapes.pictures import SIDE

CHANNELS = 8
GRID = SIDE // 8
WIDTH = 96
LATENT_DEVIATION = 0.7


def to_values(pictures: np.ndarray) -> Tensor:
    """(n, 3, 64, 64) in -1 .. 1 of pictures (n, 64, 64, 3), uint8."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class Autoencoder(nn.Module):
    """Encoder, decoder, and the mean and scale that centre the latents of the world's pictures at `LATENT_DEVIATION`."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(8), nn.Conv2d(192, WIDTH, 1), nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv2d(WIDTH, CHANNELS, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv2d(WIDTH, 192, 1), nn.PixelShuffle(8),
        )  # fmt: skip
        self.register_buffer("mean", torch.zeros(CHANNELS, GRID, GRID))
        self.register_buffer("scale", torch.ones(()))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Autoencoder:
        """The frozen codec of stored tensors."""
        model = cls()
        model.load_state_dict(dict(tensors))
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> Tensor:
        """Latents (n, 8, 8, 8), on the codec's device, of pictures (n, 64, 64, 3), uint8."""
        return (self.encoder(to_values(pictures).to(self.mean.device)) - self.mean) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures (n, 64, 64, 3), uint8, of latents (n, 8, 8, 8)."""
        pieces = [self.decoder(piece / self.scale + self.mean) for piece in latents.to(self.mean.device).split(100)]
        values = torch.cat(pieces).clamp(-1, 1).add(1).mul(127.5).round().byte()
        return values.permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def centre(self, pictures: np.ndarray) -> None:
        """Set mean and scale to those of the latents of pictures."""
        latents = self.encoder(to_values(pictures).to(self.mean.device))
        self.mean.copy_(latents.mean(0))
        self.scale.copy_(LATENT_DEVIATION / (latents - self.mean).std())
