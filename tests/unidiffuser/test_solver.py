"""The samplers by name: against diffusers' schedulers, against their formulas written out, and their order of convergence."""

from __future__ import annotations

import json
from math import floor, log
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from tests.unidiffuser.gaussian import IMAGE_AND_TEXT, GaussianWorld
from unidiffuser import era
from unidiffuser.analytic import optimal_variance
from unidiffuser.modalities import all_parts
from unidiffuser.sampling import DETERMINISTIC, SAMPLERS, sample
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.solver import DEFAULT_SAMPLER, DEFAULT_STEPS, solve


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
    "dpm++2m": (DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "dpmsolver++", "euler_at_final": True}),
    "dpm++3m": (DPMSolverMultistepScheduler, {"solver_order": 3, "algorithm_type": "dpmsolver++", "euler_at_final": True}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2, "predict_x0": True}),
    "ddim": (DPMSolverMultistepScheduler, {"solver_order": 1, "algorithm_type": "dpmsolver++", "euler_at_final": True}),
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


def ideal(mean: Tensor, covariance: Tensor):
    """The expected noise of N(mean, covariance), as `solve` asks for it, of one part `x` (B, numbers)."""
    alpha_bar, unit = NoiseSchedule().alpha_bar.double(), torch.eye(len(mean), dtype=torch.float64)

    def noise_of(parts, t):
        a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        total = a**2 * covariance + s**2 * unit
        return {"x": s * torch.linalg.solve(total, (parts["x"].double() - a * mean).T).T}

    return noise_of


def flow_errors(world: GaussianWorld, sampler: str, steps: int) -> tuple[float, float]:
    """How far they are from where the flow in closed form takes the same noise: after two thirds of the steps, and at the end."""
    alpha_bar = NoiseSchedule().alpha_bar.double()
    start = torch.randn(200, len(world.mean), generator=torch.Generator().manual_seed(0))
    values, vectors = torch.linalg.eigh(world.covariance)
    at: dict[int, Tensor] = {}
    solve(
        ideal(world.mean, world.covariance), {"x": start}, NoiseSchedule(), steps, sampler, dict,
        lambda step, t, parts: at.update({1000 - 999 * (step + 1) // steps: parts["x"].double()}),
    )  # fmt: skip

    def error(t: int) -> float:
        noise, last = ((1 - alpha_bar[n]) / alpha_bar[n] for n in (t, 1000))
        shrink = vectors @ torch.diag(((values + noise) / (values + last)).sqrt()) @ vectors.T
        exact = alpha_bar[t].sqrt() * (world.mean + (start / alpha_bar[1000].sqrt() - world.mean) @ shrink)
        return (at[t] - exact).square().mean().sqrt().item()

    return error(334), error(1)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_a_deterministic_sampler_converges_to_the_exact_flow_with_its_order(world, sampler):
    """Four times the steps: a quarter of the error of a solver of first order, and a sixteenth or less of one of second order."""
    (coarse, rough), (fine, end) = (flow_errors(world, sampler, steps) for steps in (27, 111))
    least, most = (0.9, 1.1) if sampler == "ddim" else (1.9, 3.5)
    assert least < log(coarse / fine, 111 / 27) < most
    # The last steps are long in the logarithm of signal to noise, and there the order shows only in thousands of them.
    assert end < rough / (3 if sampler == "ddim" else 5) and end < (2e-2 if sampler == "ddim" else 4e-3)


@pytest.mark.parametrize(("t", "s"), [(1000, 960), (700, 500), (300, 100), (41, 1)])
def test_the_optimal_variance_is_that_of_the_reverse_step_of_the_truth(t, s):
    """Of data that are 1 or -1: the mean square of what the step's own mean leaves, over a million true pairs (x_s, x_t)."""
    alpha_bar = NoiseSchedule().alpha_bar.double()
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 2, (1_000_000,), generator=generator).double() * 2 - 1
    one, two = torch.randn(2, len(x0), generator=generator, dtype=torch.float64)
    now, then = alpha_bar[t], alpha_bar[s]
    xs = then.sqrt() * x0 + (1 - then).sqrt() * one
    xt = (now / then).sqrt() * xs + (1 - now / then).sqrt() * two
    expected = torch.tanh(now.sqrt() * xt / (1 - now))  # E[x_0 | x_t]
    noise = (xt - now.sqrt() * expected) / (1 - now).sqrt()
    least = (1 - then) / (1 - now) * (1 - now / then)
    mean = then.sqrt() * expected + (1 - then - least).sqrt() * noise
    found = optimal_variance(now, then, noise.square().mean())
    torch.testing.assert_close(found, (xs - mean).square().mean(), rtol=0.01, atol=0)
    assert t != 700 or found > 1.2 * least


@pytest.mark.parametrize(("sampler", "within"), [("dpm++2m-sde", 0.08), ("analytic-dpm", 0.02)])
def test_samplers_that_add_noise_keep_the_spread_in_few_steps(sampler, within):
    """Of 4,000 equal numbers, in 20 steps of the ideal network: without its right last step one is 43% off, with the variance
    given x_0 alone the other is 17% off."""
    mean, std, alpha_bar = 0.3, 0.5, NoiseSchedule().alpha_bar.double()

    def noise_of(parts, t):
        a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        return {"x": s * (parts["x"].double() - a * mean) / (a**2 * std**2 + s**2)}

    generator = torch.Generator().manual_seed(0)

    def fresh():
        return {"x": torch.randn(4, 4000, generator=generator)}

    drawn = solve(noise_of, fresh(), NoiseSchedule(), 20, sampler, fresh)["x"]
    truth = (alpha_bar[1] * std**2 + 1 - alpha_bar[1]).sqrt()
    assert drawn.std().item() == pytest.approx(truth.item(), rel=within)
    assert drawn.mean().item() == pytest.approx(mean, abs=0.02)


def test_era_chooses_its_bases_by_the_error():
    def by_hand(last: int, error: float) -> list[int]:
        """The paper's power function, made different from the lowest on."""
        places: list[int] = []
        for m in range(era.BASES):
            wanted = min(floor(((m + 1) / era.BASES) ** error * last), last - era.BASES + 1 + m)
            places.append(max(wanted, places[-1] + 1 if places else 0))
        return places

    errors = [0.0, 0.1, 0.5, 1.0, 2.0, 50.0]
    for last in (3, 4, 9, 40):
        found = era.chosen(last, torch.tensor(errors))
        assert found.tolist() == [by_hand(last, error) for error in errors]
        assert found[0].tolist() == [last - 3, last - 2, last - 1, last]
    assert era.chosen(40, torch.tensor([1.0])).tolist() == [[10, 20, 30, 40]]
    assert era.chosen(40, torch.tensor([50.0])).tolist() == [[0, 1, 2, 40]]


def test_era_is_its_formula_written_out(world):
    """Nine steps of one sample with numpy's polynomials, DDIM's step and the weights of the implicit Adams method."""
    noise_of, alpha_bar = ideal(world.mean, world.covariance), NoiseSchedule().alpha_bar.double()
    start = torch.randn(3, len(world.mean), generator=torch.Generator().manual_seed(1))
    found = solve(noise_of, {"x": start}, NoiseSchedule(), 9, "era", dict)["x"].double()
    path = [int(i) + 1 for i in np.linspace(0, 999, 10).round()[::-1]]
    for row in range(3):
        x, seen, predicted, used = start[row : row + 1].double(), [], None, set()
        for here, (t, following) in enumerate(zip(path, path[1:], strict=False)):
            seen.append(noise_of({"x": x}, t)["x"])
            noise = seen[-1]
            if here >= 3:
                error = 1.0 if predicted is None else (noise - predicted).square().mean().sqrt().item() / era.TOLERANCE
                bases = era.chosen(here, torch.tensor([error]))[0].tolist()
                used.add(tuple(here - base for base in bases))
                values = torch.cat([seen[base] for base in bases]).numpy()
                line = np.polynomial.Polynomial.fit
                ends = [line([path[b] for b in bases], values[:, n], 3)(following) for n in range(values.shape[1])]
                predicted = torch.tensor([ends])
                noise = (9 * predicted + 19 * seen[-1] - 5 * seen[-2] + seen[-3]) / 24
            now, then = alpha_bar[t], alpha_bar[following]
            x = then.sqrt() * (x - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise
        torch.testing.assert_close(found[row : row + 1], x, atol=1e-3, rtol=1e-3)
        assert len(used) > 1


def test_the_default_is_what_the_table_says():
    rows = json.loads(Path("docs/results/samplers.json").read_text())["details"]["gaussian"]["Stable Diffusion's"]
    taken = {row["sampler"]: row["error"][str(DEFAULT_STEPS)] for row in rows if row["last step"] in ("first order", "its own")}
    assert min(taken, key=taken.get) == DEFAULT_SAMPLER and taken.keys() == SAMPLERS.keys()
