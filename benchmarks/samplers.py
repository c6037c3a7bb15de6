"""Every sampler in a Gaussian world, where the network is exact and the truth is known: how far are samples of few steps from it?

What is measured is the 2-Wasserstein distance of the samples' distribution from that of the data, over the root of the data's
summed variances. There is no chance in it: the noise is made of vectors whose mean is exactly 0 and whose covariance is exactly
1, also between the draws of one way. Each sampler of diffusers is measured with three last steps: of its own order, of first
order (`euler_at_final`), and to no noise at all.

What a trained network's samples are worth stands on the same page; `benchmarks.sweeps` measures it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.frame import Result, machine, progress
from benchmarks.samplers_page import curves
from benchmarks.sweeps import keep, kept
from tests.unidiffuser.gaussian import IMAGE_AND_TEXT, GaussianWorld
from unidiffuser.guidance import GuidedNoise
from unidiffuser.sampling import NoiseSource
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.solver import DETERMINISTIC, SAMPLERS, STOCHASTIC, Maker, run
from unidiffuser.tasks import Task

STEPS = (5, 10, 20, 25, 50)
# Scales of guidance, and samples of each.
SCALES, GUIDED = (1.0, 3.0, 7.0), 64
# Last step -> what it takes of a scheduler of diffusers.
LAST_STEPS: dict[str, dict[str, Any]] = {
    "own order": {"euler_at_final": False},
    "first order": {"euler_at_final": True},
    "to zero": {"final_sigmas_type": "zero"},
}
# These end with a step of first order anyway, and unipc has no setting for it.
OF_FIRST_ORDER: dict[str, dict[str, Any]] = {"first order": {}, "to zero": {"final_sigmas_type": "zero"}}
SCHEDULES = {"Stable Diffusion's": NoiseSchedule(), "the shapes'": NoiseSchedule(0.005, 0.02)}


def variants() -> dict[tuple[str, str], Maker]:
    """(sampler, last step) -> what makes its scheduler."""
    found: dict[tuple[str, str], Maker] = {}
    for name, maker in SAMPLERS.items():
        if isinstance(maker, partial):
            for last, settings in (OF_FIRST_ORDER if name in ("unipc", "ddim") else LAST_STEPS).items():
                found[name, last] = partial(maker, **settings)
        else:
            found[name, "its own"] = maker
    return found


def exact_noise(rows: int, draws: int, numbers: int) -> Tensor:
    """Noise (rows, draws, numbers) with mean 0, variance 1 and no correlation, all exactly; rows > draws x numbers."""
    noise = torch.randn(rows, draws * numbers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orthogonal, _ = torch.linalg.qr(noise - noise.mean(0))
    return (orthogonal * rows**0.5).view(rows, draws, numbers)


def distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other: Tensor) -> float:
    """2-Wasserstein distance of two normal distributions."""
    root = _root(covariance)
    squared = (mean - other_mean).square().sum() + (covariance + other - 2 * _root(root @ other @ root)).trace()
    return float(squared.clamp(min=0).sqrt())


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def error(maker: Maker, stochastic: bool, steps: int, schedule: NoiseSchedule, mean: Tensor, covariance: Tensor) -> float:
    """How far samples in so many steps are from N(mean, covariance)."""
    numbers, draws = len(mean), steps + 1 if stochastic else 1
    noise = exact_noise(max(1024, 2 * draws * numbers), draws, numbers)
    following = iter(range(1, draws))

    def noise_of(parts: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
        alpha_bar = schedule.alpha_bar[t].double()
        total = alpha_bar * covariance + (1 - alpha_bar) * torch.eye(numbers)
        centred = parts["x"].double() - alpha_bar.sqrt() * mean
        return {"x": (1 - alpha_bar).sqrt() * torch.linalg.solve(total, centred.T).T}

    fresh = (lambda: {"x": noise[:, next(following)]}) if stochastic else None
    drawn = run(maker, noise_of, {"x": noise[:, 0]}, schedule, steps, fresh)["x"].double()
    return distance(drawn.mean(0), drawn.T.cov(correction=0), mean, covariance) / float(covariance.trace().sqrt())


def measured(schedule: NoiseSchedule) -> list[dict[str, Any]]:
    """A row a sampler and last step: its error by number of steps."""
    mean, covariance = GaussianWorld.random(IMAGE_AND_TEXT).marginal("image", "text")
    rows = []
    for (name, last), maker in variants().items():
        errors = {steps: error(maker, name in STOCHASTIC, steps, schedule, mean, covariance) for steps in STEPS}
        progress(" ".join([name, f"({last})", *(f"{steps}={found:.4f}" for steps, found in errors.items())]))
        rows.append({"sampler": name, "last step": last, "error": errors})
    return rows


def guided(scale: float) -> list[dict[str, Any]]:
    """A row a deterministic sampler: how far from where a thousand steps take the same noise, over the spread of those samples.

    Pictures given texts, guided. Samplers that add noise end elsewhere when guided, so they have no place here.
    """
    world, schedule, task = GaussianWorld.random(IMAGE_AND_TEXT), NoiseSchedule(), Task(sample=("image",), given=("text",))
    noise = NoiseSource(IMAGE_AND_TEXT, range(GUIDED), torch.device("cpu"))
    start, stand_in = noise.draw(), noise.draw()
    given = {"text": world.split(world.draw(GUIDED))["text"].float()}

    def ends(sampler: str, steps: int) -> Tensor:
        noise_of = GuidedNoise(world, IMAGE_AND_TEXT, task, given, 0, stand_in, scale, None, schedule.steps, None)
        drawn = {name: start[name] for name in ("latent", "clip")}
        return world.flat(run(SAMPLERS[sampler], noise_of, drawn, schedule, steps))

    truth = ends("dpm++2m", schedule.steps - 1)
    return [
        {
            "sampler": name,
            "error": {
                steps: float((ends(name, steps) - truth).square().mean().sqrt() / truth.std(0).square().mean().sqrt())
                for steps in STEPS
            },
        }
        for name in DETERMINISTIC
    ]


def main(
    file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here; page and curves beside it.", metavar="FILE")
    ] = None,
) -> None:
    """Compare samplers, numbers of steps and last steps with the truth."""
    torch.set_num_threads(1)
    words = machine(torch.device("cpu"))
    found = {name: measured(schedule) for name, schedule in SCHEDULES.items()}
    by = {(row["sampler"], row["last step"]): row["error"] for row in found["Stable Diffusion's"]}
    plain, ours = (by["dpm++2m", last][25] for last in ("own order", "first order"))
    best = min(by, key=lambda variant: by[variant][25])
    figures = {"dpm_2m": ours, "dpm_2m_own_order": plain, "best": best[0], "best_error": by[best][25]}
    trained = kept(file) if file is not None else {}
    details = {"gaussian": found, "guided": {f"{scale:g}": guided(scale) for scale in SCALES}}
    Result("samplers", plain / ours, "own-order", figures, words, details).finish(file)
    if file is not None:
        keep(file, trained)
        curves(file.with_suffix(".png"), json.loads(file.read_text()))


if __name__ == "__main__":
    typer.run(main)
