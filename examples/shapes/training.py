"""Training: the project's U-ViT and joint objective on fresh pairs, with a history of losses and of accuracies on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from examples.encoders.progress import WEIGHT_DECAY, Averaged, adamw, cosine_fall, train
from examples.shapes.autoencoder import Autoencoder
from examples.shapes.codec import MODALITIES, SCHEDULE, encode_captions
from examples.shapes.history import History
from examples.shapes.measure import Artist, Protocol, conditional
from examples.shapes.pictures import render
from examples.shapes.world import PHRASINGS, SCENES, caption, joint
from unidiffuser.compiling import find_compiler
from unidiffuser.objective import JointObjective
from unidiffuser.uvit import UViT, UViTConfig

CONFIG = UViTConfig(width=128, depth=6, heads=4, modalities=MODALITIES, position_std=0.5)
STEPS = 32000
BATCH = 64
# The losses stand still at a constant rate and fall with it, so it falls all the way.
PEAK_LEARNING_RATE = 2e-3
# Most of the unweighted loss is pixel noise at nearly clean timesteps; what a scene shows is decided at noisy ones.
MIN_SNR_GAMMA = 0.5
# About the last tenth of the training is averaged: what the network believes of the scenes wavers with what it saw last.
AVERAGE_DECAY = 0.9998
CHECKS = 10
CHECK = Protocol(conditional=100, steps=10, sampler="dpm++2m", seed=2_000_000)


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build() -> UViT:
    """The untrained network, always the same."""
    torch.manual_seed(0)
    return UViT(CONFIG).to(device())


_SOBOL = torch.quasirandom.SobolEngine(4, scramble=True, seed=0)


def evenly(step: int, size: int) -> np.ndarray:
    """(size, 4) in 0 .. 1 for a step: the next points of a scrambled Sobol sequence.

    Each number is uniform and they are independent, as if drawn at random, but every stretch of steps has close to its share of
    each combination. In 16,000 random pairs some 2,500 have timesteps at which the picture tells nothing and the caption is
    undecided; from these the network learns which captions there are, and their scenes are 0.07 in total variation from the
    world's. Of as many of these points: 0.02.
    """
    if _SOBOL.num_generated != step * size:
        _SOBOL.reset().fast_forward(step * size)
    return _SOBOL.draw(size, dtype=torch.float64).numpy()


def batch_at(step: int, size: int, codec: Autoencoder) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Fresh pairs for one step, by part, and their timesteps, by modality, which depend on the step alone."""
    points = evenly(step, size)
    scenes = [SCENES[index] for index in np.searchsorted(joint().ravel().cumsum()[:-1], points[:, 0])]
    rng = np.random.default_rng(step)
    pictures = np.stack([render(scene, rng) for scene in scenes])
    captions = [caption(scene, int(len(PHRASINGS) * point)) for scene, point in zip(scenes, points[:, 1], strict=True)]
    timesteps = torch.from_numpy(1 + (SCHEDULE.steps * points[:, 2:]).astype(int)).to(device())
    pairs = {"latent": codec.encode(pictures), "words": encode_captions(captions).to(device())}
    return pairs, {"image": timesteps[:, 0], "text": timesteps[:, 1]}


def optimizers(model: UViT) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, which is in 1,200 steps where AdamW alone is in 2,400, and AdamW for the rest."""
    inner = {name: value for name, value in model.named_parameters() if value.ndim == 2 and "_block" in name}
    rest = [value for name, value in model.named_parameters() if name not in inner]
    muon = torch.optim.Muon(inner.values(), weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw(rest)]


def fit(state: Path, codec: Autoencoder, steps: int) -> tuple[UViT, History]:
    """Train to `steps`, or go on where the last run stopped, and give the network with the averaged weights."""
    objective = JointObjective(MODALITIES, SCHEDULE, MIN_SNR_GAMMA)
    model, averaged = build(), build()
    if find_compiler(device()) is not None:
        model.compile()
    else:
        print("no compiler found: training goes on without compilation", flush=True)
    history = History(state / "shapes.jsonl")

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = torch.Generator(device()).manual_seed(step)
        pairs, timesteps = batch_at(step, BATCH, codec)
        _, noise = objective.draw(pairs, generator)
        loss, parts = objective.loss(model, pairs, timesteps, noise)
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

    rate = cosine_fall(steps, PEAK_LEARNING_RATE)
    weights = train(state / "shapes.pt", model, loss_at, steps, rate, optimizers(model), AVERAGE_DECAY, watch)
    averaged.load_state_dict(weights)
    return averaged.eval(), history
