"""diffusers' schedulers as solvers of the reverse process, with the network's timesteps.

diffusers counts timesteps from 0, where index i has the noise level of our t = i + 1; the network was trained with t, so
it is called with i + 1. Steps are spaced evenly from T to 1, and the result is taken at t = 1, whose noise (standard
deviation 0.03) is below what anyone sees.

These solvers step in the logarithm of signal to noise, and there the last step is several times as long as the one before it
(of 25 steps: from t = 41 to t = 1). Carrying a curve on over it goes wrong, so the last step is of first order
(`euler_at_final`). A last step to no noise at all would be of first order too, and longer: it shrinks the variance of the
samples. docs/results/samplers.md compares the three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DPMSolverMultistepInverseScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from unidiffuser.analytic import AnalyticScheduler
from unidiffuser.era import EraScheduler
from unidiffuser.schedule import NoiseSchedule

# Makes a scheduler of diffusers' kind from a schedule and from how many numbers each part of a state has.
Maker = Callable[[NoiseSchedule, Sequence[int]], Any]


def scheduler_settings(schedule: NoiseSchedule) -> dict[str, Any]:
    """The settings of a diffusers scheduler for ``schedule``."""
    return {
        "num_train_timesteps": schedule.steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "linspace",
        "final_sigmas_type": "sigma_min",
        "prediction_type": "epsilon",
    }


def from_diffusers(scheduler: type, schedule: NoiseSchedule, sizes: Sequence[int], **settings: Any) -> Any:
    """A scheduler of diffusers, which treats all numbers alike."""
    return scheduler(**scheduler_settings(schedule) | settings)


_dpm = partial(from_diffusers, DPMSolverMultistepScheduler, euler_at_final=True)

# First-order DPM-Solver++ is DDIM (arXiv 2211.01095, section 4); unlike DDIMScheduler it takes any number of steps.
SAMPLERS: dict[str, Maker] = {
    "dpm++2m": partial(_dpm, solver_order=2),
    "dpm++3m": partial(_dpm, solver_order=3),
    "unipc": partial(from_diffusers, UniPCMultistepScheduler, solver_order=2),
    "ddim": partial(_dpm, solver_order=1),
    # The same process with fresh noise at every step. It forgets the network's early errors, where the others carry them to the
    # end as something between two things, and wants more steps.
    "dpm++2m-sde": partial(_dpm, solver_order=2, algorithm_type="sde-dpmsolver++"),
    "era": lambda schedule, sizes: EraScheduler(schedule),
    "analytic-dpm": AnalyticScheduler,
}

# These add noise at every step. What the others draw is a function of the starting noise: only their way can be gone back, see
# `invert`.
STOCHASTIC = ("dpm++2m-sde", "analytic-dpm")
DETERMINISTIC = tuple(name for name in SAMPLERS if name not in STOCHASTIC)
# With the paper's schedule the nearest of all to known truth from 20 steps on: docs/results/samplers.md. What goes back to the
# noise of a picture takes the other, which adds none.
DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_DETERMINISTIC = "dpm++2m-sde", 25, "dpm++2m"

NoiseOf = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]
# (step from 0, timestep in 1 .. T that the network was called with, the parts (B, *shape) after the step).
Callback = Callable[[int, int, dict[str, Tensor]], object]


def solve(
    noise_of: NoiseOf,
    start: Mapping[str, Tensor],
    schedule: NoiseSchedule,
    steps: int,
    sampler: str,
    fresh: Callable[[], Mapping[str, Tensor]],
    callback: Callback | None = None,
) -> dict[str, Tensor]:
    """Samples (B, *shape) by part from noise ``start`` at T.

    Args:
        noise_of: predicted noise of the parts, given the parts and a timestep in 1 .. T.
        steps: calls of ``noise_of``.
        sampler: a name in ``SAMPLERS``.
        fresh: gives standard normal noise of all parts; asked once a step by a sampler that adds noise, and by no other.
        callback: called after every step, see ``Callback``.

    Raises:
        ValueError: there is no such sampler, or ``steps`` is not in 1 .. T - 1.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"no sampler named {sampler!r}; there are {', '.join(SAMPLERS)}")
    return run(SAMPLERS[sampler], noise_of, start, schedule, steps, None if sampler in DETERMINISTIC else fresh, callback)


def invert(
    noise_of: NoiseOf, data: Mapping[str, Tensor], schedule: NoiseSchedule, steps: int, callback: Callback | None = None
) -> dict[str, Tensor]:
    """The noise at T from which ``solve`` makes ``data`` again: the same equation, solved the other way."""

    def backwards(schedule: NoiseSchedule, sizes: Sequence[int]) -> Any:
        settings = scheduler_settings(schedule)
        del settings["final_sigmas_type"]
        return DPMSolverMultistepInverseScheduler(**settings)

    return run(backwards, noise_of, data, schedule, steps, callback=callback)


def run(
    maker: Maker,
    noise_of: NoiseOf,
    start: Mapping[str, Tensor],
    schedule: NoiseSchedule,
    steps: int,
    fresh: Callable[[], Mapping[str, Tensor]] | None = None,
    callback: Callback | None = None,
) -> dict[str, Tensor]:
    """``solve`` by a scheduler that is given, with fresh noise at every step if ``fresh`` is.

    Raises:
        ValueError: ``steps`` is not in 1 .. T - 1.
    """
    if not 1 <= steps < schedule.steps:
        raise ValueError(f"steps must be in 1 .. {schedule.steps - 1}, not {steps}")
    names, shapes = list(start), [value.shape for value in start.values()]
    sizes = [shape[1:].numel() for shape in shapes]
    scheduler = maker(schedule, sizes)
    scheduler.set_timesteps(steps)

    def split(state: Tensor) -> dict[str, Tensor]:
        pieces = state.split(sizes, dim=1)
        return {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}

    # The solvers work element by element, so all drawn parts go through one scheduler as one long vector a sample.
    def joined(parts: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([parts[name].float().flatten(1) for name in names], dim=1)

    state = joined(start)
    for step, index in enumerate(scheduler.timesteps.tolist()):
        noise = joined(noise_of(split(state), index + 1))
        added = {"variance_noise": joined(fresh())} if fresh is not None else {}
        state = scheduler.step(noise, index, state, return_dict=False, **added)[0]
        if callback is not None:
            callback(step, index + 1, split(state))
    return split(state)
