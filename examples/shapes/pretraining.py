"""How the picture codec is trained, before the network and on pictures that tell nothing of the world's distribution.

Its latents carry noise of a fixed deviation and pay for their square, which is a variational autoencoder whose posterior has a
constant variance: latents stay small and smooth, and the decoder forgives what the network gets slightly wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from examples.shapes.autoencoder import CHANNELS, GRID, Autoencoder, to_values
from examples.shapes.pictures import PALETTE, RADIUS, RADIUS_JITTER, SHADE_JITTER, SIDE, blank, paint, render
from examples.shapes.world import COLOURS, FORMS, draw
from training.averaging import EmaConfig
from training.optimizers.adamw import AdamW
from training.single import SingleTraining, late_fall

BATCH = 16
PRESENT = 0.6
CROWD_SPACING = 20.0
OPTIMIZER = AdamW(lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
AVERAGE = EmaConfig(decay=0.998)
POSTERIOR_DEVIATION = 0.15
SQUARE_WEIGHT = 5e-4
SCALING_PICTURES = 500


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
