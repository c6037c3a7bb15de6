"""The noise schedule and the training objective against their formulas and diffusers' schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from unidiffuser.modalities import Modality, Part, paper_modalities
from unidiffuser.objective import JointObjective
from unidiffuser.sampling import sample
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.tasks import Task
from unidiffuser.uvit import UViT, UViTConfig

SMALL = paper_modalities((2, 4, 4), clip=6, text=(3, 5), weights=(1.0, 0.2, 0.8))


class Recorder(nn.Module):
    """Predicts half of each input, and keeps what it was called with."""

    def forward(self, x, t):
        self.x, self.t = x, t
        return {name: 0.5 * part for name, part in x.items()}


def batch(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"latent": (2, 4, 4), "clip": (6,), "text": (3, 5)}
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}


def test_schedule_is_diffusers_scaled_linear_shifted_by_one():
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    ours = NoiseSchedule().alpha_bar
    assert ours[0] == 1 and len(ours) == 1001
    torch.testing.assert_close(ours[1:], theirs, atol=1e-6, rtol=1e-4)


def test_add_noise_at_both_ends_and_in_between():
    schedule = NoiseSchedule()
    x, noise = torch.ones(3, 2, 2), torch.full((3, 2, 2), 2.0)
    noised = schedule.add_noise(x, noise, torch.tensor([0, 500, 1000]))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    for row, t in zip(noised, (0, 500, 1000), strict=True):
        alpha_bar = np.prod(1 - betas[:t])
        assert row[0, 0].item() == pytest.approx(alpha_bar**0.5 + 2 * (1 - alpha_bar) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_is_the_weighted_mean_of_the_parts_squared_errors(gamma):
    schedule, data, model = NoiseSchedule(), batch(64), Recorder()
    loss, parts = JointObjective(SMALL, schedule, gamma)(model, data, torch.Generator().manual_seed(1))
    expected = {}
    for name, clean in data.items():
        t = model.t["text" if name == "text" else "image"].numpy()
        alpha_bar = schedule.alpha_bar.double().numpy()[t].reshape(-1, *[1] * (clean.dim() - 1))
        noise = (model.x[name].double().numpy() - alpha_bar**0.5 * clean.numpy()) / (1 - alpha_bar) ** 0.5
        squared = (0.5 * model.x[name].numpy() - noise) ** 2
        if gamma is not None:
            snr = alpha_bar / (1 - alpha_bar)
            squared = squared * np.minimum(snr, gamma) / snr
        expected[name] = squared.mean()
        assert parts[name].item() == pytest.approx(expected[name], rel=1e-3)
    total = (1.0 * expected["latent"] + 0.2 * expected["clip"] + 0.8 * expected["text"]) / 2.0
    assert loss.item() == pytest.approx(total, rel=1e-3)


def test_timesteps_are_independent_and_uniform_over_1_to_1000():
    model = Recorder()
    JointObjective(SMALL, NoiseSchedule())(model, batch(20_000), torch.Generator().manual_seed(1))
    image, text = model.t["image"].double(), model.t["text"].double()
    for t in (image, text):
        assert t.min() == 1 and t.max() == 1000
        assert abs(t.mean() - 500.5) < 5 * 289 / 20_000**0.5
        assert (torch.bincount((t.long() - 1) // 100, minlength=10) - 2000).abs().max() < 5 * 2000**0.5
    assert abs(torch.corrcoef(torch.stack([image, text]))[0, 1]) < 5 / 20_000**0.5


def test_noise_is_standard_normal():
    _, noise = JointObjective(SMALL, NoiseSchedule()).draw(batch(5_000), torch.Generator().manual_seed(1))
    for part in noise.values():
        assert abs(part.mean()) < 5 / part.numel() ** 0.5
        assert abs(part.var() - 1) < 5 * (2 / part.numel()) ** 0.5


def test_the_data_type_reaches_a_model_that_has_a_token_for_it():
    model = UViT(UViTConfig(width=16, depth=2, heads=2, modalities=SMALL, data_type_token=True))
    objective = JointObjective(SMALL, NoiseSchedule())
    with torch.no_grad():
        web, internal = (objective(model, batch(4), torch.Generator().manual_seed(1), data_type=kind)[0] for kind in (0, 1))
    assert web != internal


def test_the_generator_decides_and_the_gradient_flows():
    model = UViT(UViTConfig(width=16, depth=2, heads=2, modalities=SMALL))
    objective = JointObjective(SMALL, NoiseSchedule())
    first, again, other = (objective(model, batch(4), torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert first == again and first != other
    first.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_default_weights_are_the_flat_mean_at_512_pixels():
    image, text = paper_modalities()
    parts = [*image.parts, *text.parts]
    elements = np.array([np.prod(part.shape) for part in parts])
    assert np.allclose([part.weight for part in parts], elements / elements.sum(), atol=0.005)
    assert [part.weight for part in paper_modalities((4, 32, 32))[0].parts] == [part.weight for part in image.parts]


def test_no_weight_at_all_is_refused():
    with pytest.raises(ValueError, match="all loss weights are 0"):
        JointObjective([Modality(name="m", parts=(Part(name="p", shape=(2,), weight=0),))], NoiseSchedule())


def test_three_modalities_train_and_sample_without_new_code():
    """A picture, a sound and a label that share one hidden sign: learned jointly, then asked every way."""
    torch.manual_seed(0)
    modalities = (
        Modality(name="image", parts=(Part(name="pixels", shape=(1, 2, 2), patch=2),)),
        Modality(name="sound", parts=(Part(name="waves", shape=(2, 2)),)),
        Modality(name="label", parts=(Part(name="label", shape=(4,)),)),
    )
    model = UViT(UViTConfig(width=32, depth=2, heads=2, modalities=modalities, position_std=0.3))
    objective = JointObjective(modalities, NoiseSchedule())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=400, pct_start=0.1)

    def world(sign: torch.Tensor) -> dict[str, torch.Tensor]:
        column = sign[:, None]
        return {
            "pixels": column[..., None, None] + 0.3 * torch.randn(len(sign), 1, 2, 2),
            "waves": -column[..., None] + 0.3 * torch.randn(len(sign), 2, 2),
            "label": column + 0.1 * torch.randn(len(sign), 4),
        }

    losses = []
    for _ in range(400):
        loss, _ = objective(model, world(torch.randint(0, 2, (256,)) * 2.0 - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.4 * np.mean(losses[:3])

    model.eval()
    sign = torch.tensor([1.0, -1.0]).repeat(48)
    clean = world(sign)

    def agreement(sampled: tuple[str, ...], given: tuple[str, ...]) -> list[float]:
        """How often the drawn modalities show the sign of the given ones, or of the label drawn with them."""
        condition = {m.parts[0].name: clean[m.parts[0].name] for m in modalities if m.name in given}
        task = Task(sample=sampled, given=given)
        drawn = sample(model, task, modalities, 96, 20, 0.0, range(96), condition=condition)
        signs = {name: part.flatten(1).mean(1).sign() * (-1 if name == "waves" else 1) for name, part in drawn.items()}
        truth = sign if given else signs["label"]
        return [(value == truth).float().mean().item() for value in signs.values()]

    assert min(agreement(("image", "sound"), ("label",))) > 0.85
    assert min(agreement(("label",), ("image", "sound"))) > 0.85
    assert min(agreement(("sound",), ("image",))) > 0.85
    assert min(agreement(("image", "sound", "label"), ())) > 0.85
