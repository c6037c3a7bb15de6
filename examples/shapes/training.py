"""Training: the project's U-ViT and joint objective on fresh pairs, with a history of losses and of accuracies on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from examples.encoders.progress import Averaged, train
from examples.shapes.autoencoder import Autoencoder
from examples.shapes.codec import MODALITIES, encode_captions
from examples.shapes.history import History
from examples.shapes.measure import Artist, Protocol, conditional
from examples.shapes.pictures import render
from examples.shapes.world import draw, draw_captions
from unidiffuser.compiling import find_compiler
from unidiffuser.objective import JointObjective
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.uvit import UViT, UViTConfig

CONFIG = UViTConfig(width=128, depth=6, heads=4, modalities=MODALITIES, position_std=0.5)
STEPS = 33000
BATCH = 32
PEAK_LEARNING_RATE = 1.5e-3
# Most of the unweighted loss is pixel noise at nearly clean timesteps; what a scene shows is decided at noisy ones.
MIN_SNR_GAMMA = 0.3
CHECKS = 10
CHECK = Protocol(conditional=100, steps=10, sampler="dpm++2m", seed=2_000_000)


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build() -> UViT:
    """The untrained network, always the same."""
    torch.manual_seed(0)
    return UViT(CONFIG).to(device())


def batch_at(step: int, size: int, codec: Autoencoder) -> dict[str, torch.Tensor]:
    """Fresh pairs for one step, which depend on the step alone."""
    rng = np.random.default_rng(step)
    scenes = draw(rng, size)
    pictures = np.stack([render(scene, rng) for scene in scenes])
    words = encode_captions(draw_captions(scenes, rng))
    return {"latent": codec.encode(pictures), "words": words.to(device())}


def fit(state: Path, codec: Autoencoder, steps: int) -> tuple[UViT, History]:
    """Train to `steps`, or go on where the last run stopped, and give the network with the averaged weights."""
    objective = JointObjective(MODALITIES, NoiseSchedule(), MIN_SNR_GAMMA)
    model, averaged = build(), build()
    if find_compiler(device()) is not None:
        model.compile()
    else:
        print("no compiler found: training goes on without compilation", flush=True)
    history = History(state / "shapes.jsonl")

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = torch.Generator(device()).manual_seed(step)
        loss, parts = objective(model, batch_at(step, BATCH, codec), generator)
        figures = {"image": parts["latent"].item(), "text": parts["words"].item()}
        history.note(loss=loss.item(), **figures)
        return loss, figures

    def watch(step: int, average: Averaged) -> None:
        history.row(step, steps)
        if step % max(1, steps // CHECKS) == 0:
            averaged.load_state_dict(average.values)
            found = conditional(Artist(averaged, codec, CHECK), CHECK.conditional, CHECK.seed)
            history.add(step, **found)
            for task, shares in found.items():
                print(f"step {step} {task}:", " ".join(f"{name} {share:.2f}" for name, share in shares.items()), flush=True)

    averaged.load_state_dict(train(state / "shapes.pt", model, loss_at, steps, PEAK_LEARNING_RATE, watch=watch))
    return averaged.eval(), history
