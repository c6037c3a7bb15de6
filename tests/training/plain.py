"""A training written out in plain torch, which the trainer's is compared with: no engine, no sharding, no own optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.loader import Batch, Loader
from training.loop import uvit_config
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.uvit import UViT

WEIGHTS = {"latent": 0.75, "clip": 0.02, "text": 0.23}
PARTS = (("latent", "image"), ("clip", "image"), ("text", "text"))


def start(shards: Sequence[str], settings: TrainConfig) -> UViT:
    """The network that a training starts with."""
    torch.manual_seed(settings.seed)
    return UViT(uvit_config(settings, Loader(settings, shards).modalities))


def losses_of(
    model: UViT, batch: Batch, gamma: float = math.inf, betas: tuple[float, float] = (0.00085, 0.012)
) -> dict[str, Tensor]:
    """Mean squared error of each part for one batch, in which the square of a sample counts min(snr, gamma) / snr."""
    alpha_bar = NoiseSchedule(*betas).alpha_bar
    noised = {}
    for part, modality in PARTS:
        signal = alpha_bar[batch.timesteps[modality]].view(-1, *[1] * (batch.clean[part].dim() - 1))
        noised[part] = signal.sqrt() * batch.clean[part] + (1 - signal).sqrt() * batch.noise[part]
    predicted = model(noised, batch.timesteps)
    found = {}
    for part, modality in PARTS:
        signal = alpha_bar[batch.timesteps[modality]]
        snr = signal / (1 - signal)
        squares = (predicted[part] - batch.noise[part]).square().flatten(1).mean(1)
        found[part] = (squares * snr.clamp(max=gamma) / snr).mean()
    return found


def loss_of(model: UViT, batch: Batch) -> Tensor:
    """UniDiffuser's objective written out for one batch, with the paper's weights."""
    return torch.stack([WEIGHTS[part] * mse for part, mse in losses_of(model, batch).items()]).sum()


class PlainMuon:
    """Muon in fp32, as its author describes it; torch's is bf16."""

    def __init__(self, matrices: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        self.param_groups = [{"lr": lr}]
        self.matrices, self.weight_decay = matrices, weight_decay
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            assert matrix.grad is not None
            momentum.mul_(0.95).add_(0.05 * matrix.grad)
            update = 0.05 * matrix.grad + 0.95 * momentum
            update /= update.norm()
            for _ in range(5):
                gram = update @ update.T
                update = 3.4445 * update - 4.7750 * gram @ update + 2.0315 * gram @ gram @ update
            matrix.mul_(1 - lr * self.weight_decay).sub_(lr * 0.2 * math.sqrt(max(matrix.shape)) * update)


def is_muons(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and "_block" in name


def optimizers_of(model: UViT, kind: str, lr: float) -> list:
    """Of AdamW (`adamw`), torch's Muon (`muon`) or one in fp32 (`muon-fp32`), with the defaults of the configuration but `lr`."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if kind != "adamw" and is_muons(name, p)]
    rest = [p for name, p in named if kind == "adamw" or not is_muons(name, p)]
    found: list = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.9), weight_decay=0.03)]
    if kind == "muon":
        found.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.03, adjust_lr_fn="match_rms_adamw"))
    elif kind == "muon-fp32":
        found.append(PlainMuon(matrices, lr, 0.03))
    return found


def train_plain(shards: Sequence[str], settings: TrainConfig, kind: str) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of all steps with a linear warm-up, and the change of each parameter in the first."""
    model, loader, lr = start(shards, settings), Loader(settings, shards), settings.optimizer.lr
    optimizers, losses = optimizers_of(model, kind, lr), []
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first: dict[str, Tensor] = {}
    for step in range(settings.steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = min(1.0, (step + 1) / settings.schedule.warmup_steps) * lr
        loss = loss_of(model, loader.batch(step))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        first = first or {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    return losses, first
