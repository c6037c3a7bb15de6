"""The picture codec: a small convolutional autoencoder, trained first and then frozen, from (3, 64, 64) to (8, 8, 8) and back.

Its latents carry noise of a fixed deviation in training and pay for their square, which is a variational autoencoder whose
posterior has a constant variance: latents stay small and smooth, and the decoder forgives what the network gets slightly wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from examples.shapes.pictures import (
    PALETTE,
    RADIUS,
    RADIUS_JITTER,
    SHADE_JITTER,
    SIDE,
    blank,
    paint,
    render,
)
from examples.shapes.world import COLOURS, FORMS, draw
from training.config import EmaConfig
from training.optimizers.adamw import AdamW
from training.single import SingleTraining, late_fall

CHANNELS = 8
GRID = SIDE // 8
WIDTH = 96
BATCH = 16
PRESENT = 0.6
CROWD_SPACING = 20.0
OPTIMIZER = AdamW(lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
AVERAGE = EmaConfig(decay=0.998)
POSTERIOR_DEVIATION = 0.15
SQUARE_WEIGHT = 5e-4
LATENT_DEVIATION = 0.7
SCALING_PICTURES = 500


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


def crowded_pictures(seed: int, count: int) -> np.ndarray:
    """Pictures (count, 64, 64, 3), uint8, of up to nine forms, each of any kind and colour.

    There is more to learn from them than from scenes of one or two, and nothing of the world's distribution.
    """
    rng = np.random.default_rng(seed)
    pictures = np.stack([blank(jitter) for jitter in rng.uniform(-1, 1, count)])
    for picture in pictures:
        shift = rng.uniform(-CROWD_SPACING / 3, CROWD_SPACING / 3, 2)
        for row, column in np.argwhere(rng.random((3, 3)) < PRESENT):
            place = SIDE / 2 + CROWD_SPACING * np.array((column - 1, row - 1)) + shift
            shade = np.array(PALETTE[COLOURS[rng.integers(len(COLOURS))]]) + SHADE_JITTER * rng.uniform(-1, 1, 3)
            radius = RADIUS * (1 + RADIUS_JITTER * rng.uniform(-1, 1))
            paint(picture, FORMS[rng.integers(len(FORMS))], place, radius, shade)
    return pictures


def reconstruction_loss(model: Autoencoder, values: Tensor, noise: Tensor) -> Tensor:
    """Squared and absolute error of the picture, and the price of the latents."""
    latents = model.encoder(values)
    difference = model.decoder(latents + POSTERIOR_DEVIATION * noise) - values
    return 5 * difference.square().mean() + difference.abs().mean() + SQUARE_WEIGHT * latents.square().mean()


def fit(device: torch.device, steps: int, say: Callable[[int, float], None] = lambda step, loss: None) -> Autoencoder:
    """Train the codec, tell `say` the loss of every step, and give it frozen."""
    torch.manual_seed(0)
    model = Autoencoder().to(device)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        noise = torch.randn(BATCH, CHANNELS, GRID, GRID, generator=torch.Generator().manual_seed(step))
        return reconstruction_loss(model, to_values(crowded_pictures(step, BATCH)).to(device), noise.to(device)), {}

    training = SingleTraining(model, [OPTIMIZER.build(model.named_parameters())], late_fall(steps), AVERAGE)
    for done, loss, _ in training.run(loss_at, steps):
        say(done, loss)
    training.take_average()
    rng = np.random.default_rng(steps)
    model.centre(np.stack([render(scene, rng) for scene in draw(rng, SCALING_PICTURES)]))
    return model.eval().requires_grad_(False)
