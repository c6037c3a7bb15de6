"""Training of the judge, on scenes that are not held out and on what a lossy picture of them may look like."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from examples.encoders.captions import scenes
from examples.encoders.progress import adamw, train
from examples.little_web.compose import render
from examples.little_web.judge import PARTS, SIDE, Judge, pixels

STEPS = 1500
BATCH = 64


def blemished(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures with other brightness and contrast, blur, noise, and stains of any colour, each a little or not at all."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    count = len(x)
    x = x * uniform(0.92, 1.08, count, 1, 1, 1) + uniform(-0.05, 0.05, count, 3, 1, 1)
    small = round(SIDE * uniform(0.3, 1.0, 1).item())
    blurred = interpolate(interpolate(x, size=small, mode="area"), size=SIDE, mode="bilinear")
    x = torch.where(uniform(0, 1, count, 1, 1, 1) < 0.5, blurred, x)
    stains = interpolate(torch.randn(count, 3, 12, 12, generator=generator), size=SIDE, mode="bilinear")
    x = x + uniform(0, 0.12, count, 1, 1, 1) * stains
    return x + uniform(0, 0.06, count, 1, 1, 1) * torch.randn(x.shape, generator=generator)


def fit(state: Path, folder: Path, steps: int = STEPS) -> None:
    """Train the judge to `steps`, resuming from `state`, and write its weights to `folder`."""
    torch.manual_seed(0)
    judge, seen = Judge(), scenes(held_out=False)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng, generator = random.Random(f"judge {step}"), torch.Generator().manual_seed(step)
        batch = [replace(rng.choice(seen), variation=rng.randrange(1, 2**31)) for _ in range(BATCH)]
        px = rng.choice((SIDE, 2 * SIDE))
        logits = judge(blemished(pixels([render(scene, px) for scene in batch]), generator))
        losses, right = [], torch.ones(len(batch), dtype=torch.bool)
        for part, values in PARTS.items():
            target = torch.tensor([values.index(getattr(scene, part)) for scene in batch])
            losses.append(cross_entropy(logits[part], target, label_smoothing=0.05))
            right &= logits[part].argmax(1) == target
        return torch.stack(losses).sum(), {"all_four": right.float().mean().item()}

    train(state / "judge.pt", judge, loss_at, steps, adamw(2e-3).build(judge.named_parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, folder / "judge.safetensors")
