"""diffusers' schedulers as solvers of the reverse process, with the network's timesteps.

diffusers counts timesteps from 0, where index i has the noise level of our t = i + 1; the network was trained with t, so
it is called with i + 1. Steps are spaced evenly from T to 1, and the result is taken at t = 1, whose noise (standard
deviation 0.03) is below what anyone sees: a last jump to 0 would be a first-order step from far away, which shrinks
the variance of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DPMSolverMultistepInverseScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from unidiffuser.schedule import NoiseSchedule

# First-order DPM-Solver++ is DDIM (arXiv 2211.01095, section 4); unlike DDIMScheduler it takes any number of steps.
SAMPLERS: dict[str, tuple[type, dict[str, Any]]] = {
    "dpm++2m": (DPMSolverMultistepScheduler, {"solver_order": 2}),
    "dpm++3m": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
    "ddim": (DPMSolverMultistepScheduler, {"solver_order": 1}),
    # The same process with fresh noise at every step. It forgets the network's early errors, where the others carry them to the
    # end as something between two things, and wants more steps.
    "dpm++2m-sde": (DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
}

# What these draw is a function of the starting noise: only their way can be gone back, see `invert`.
DETERMINISTIC = tuple(name for name in SAMPLERS if not name.endswith("-sde"))

NoiseOf = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]
# (step from 0, timestep in 1 .. T that the network was called with, the parts (B, *shape) after the step).
Callback = Callable[[int, int, dict[str, Tensor]], object]


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
    scheduler_class, settings = SAMPLERS[sampler]
    scheduler = scheduler_class(**scheduler_settings(schedule), **settings)
    return _run(scheduler, noise_of, start, schedule, steps, None if sampler in DETERMINISTIC else fresh, callback)


def invert(
    noise_of: NoiseOf, data: Mapping[str, Tensor], schedule: NoiseSchedule, steps: int, callback: Callback | None = None
) -> dict[str, Tensor]:
    """The noise at T from which ``solve`` makes ``data`` again: the same equation, solved the other way."""
    settings = scheduler_settings(schedule)
    del settings["final_sigmas_type"]
    return _run(DPMSolverMultistepInverseScheduler(**settings), noise_of, data, schedule, steps, callback=callback)


def _run(
    scheduler: Any,
    noise_of: NoiseOf,
    start: Mapping[str, Tensor],
    schedule: NoiseSchedule,
    steps: int,
    fresh: Callable[[], Mapping[str, Tensor]] | None = None,
    callback: Callback | None = None,
) -> dict[str, Tensor]:
    if not 1 <= steps < schedule.steps:
        raise ValueError(f"steps must be in 1 .. {schedule.steps - 1}, not {steps}")
    scheduler.set_timesteps(steps)
    names, shapes = list(start), [value.shape for value in start.values()]
    sizes = [shape[1:].numel() for shape in shapes]

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
