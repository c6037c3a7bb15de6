"""The samplers by name against diffusers' schedulers and against DDIM written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from tests.unidiffuser.gaussian import IMAGE_AND_TEXT, GaussianWorld
from unidiffuser.modalities import all_parts
from unidiffuser.sampling import sample


@pytest.fixture(scope="module")
def world() -> GaussianWorld:
    return GaussianWorld.random(IMAGE_AND_TEXT)


def test_ddim_is_ddim(world):
    """Against the update written out: x' = a' x_0 + s' eps, at evenly spaced timesteps from 1000 to 1."""
    ours = sample(world, "t", IMAGE_AND_TEXT, 1, 10, 0.0, [7], "ddim")["text"]
    generator = torch.Generator().manual_seed(7)
    shapes = {"latent": (1, 1, 2, 2), "clip": (1, 2), "text": (1, 2, 2)}
    start, stand_in = ({n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(2))
    x = start["text"].double()
    timesteps = [int(i) + 1 for i in np.linspace(0, 999, 11).round()[::-1]]
    for t, following in zip(timesteps, timesteps[1:], strict=False):
        noise = world({**stand_in, "text": x}, {"image": torch.tensor(1000), "text": torch.tensor(t)})["text"]
        now, then = world.alpha_bar[t], world.alpha_bar[following]
        x = then.sqrt() * (x - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise
    torch.testing.assert_close(ours, x.float(), atol=1e-4, rtol=1e-4)


THEIRS = {
    "dpm++2m": (DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    "dpm++3m": (DPMSolverMultistepScheduler, {"solver_order": 3, "algorithm_type": "dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2, "predict_x0": True}),
    "ddim": (DPMSolverMultistepScheduler, {"solver_order": 1, "algorithm_type": "dpmsolver++"}),
}


@pytest.mark.parametrize("sampler", THEIRS)
def test_a_sampler_takes_the_steps_of_the_scheduler_that_its_name_says(world, sampler):
    """Twenty steps of diffusers' scheduler by hand, on one part: the other samplers end at least a hundred times further off."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    generator = torch.Generator().manual_seed(7)
    start, stand_in = (
        {p.name: torch.randn(1, *p.shape, generator=generator) for p in all_parts(IMAGE_AND_TEXT)} for _ in range(2)
    )

    def by_hand(name: str) -> Tensor:
        scheduler_class, settings = THEIRS[name]
        scheduler = scheduler_class(trained_betas=betas.numpy(), final_sigmas_type="sigma_min", **settings)
        scheduler.set_timesteps(20)
        x = start["text"]
        for index in scheduler.timesteps:
            noise = world({**stand_in, "text": x}, {"image": torch.tensor(1000), "text": index + 1})["text"].float()
            x = scheduler.step(noise, index, x).prev_sample
        return x

    ours = sample(world, "t", IMAGE_AND_TEXT, 1, 20, 0.0, [7], sampler)["text"]
    distances = {name: (by_hand(name) - ours).abs().max().item() for name in THEIRS}
    assert distances.pop(sampler) < 1e-5
    assert min(distances.values()) > 1e-3
