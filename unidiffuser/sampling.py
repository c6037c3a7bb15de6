"""Samples from any distribution that the joint network holds (arXiv 2303.06555, sections 4.1, 4.3 and 6.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unidiffuser.guidance import GuidedNoise, check_interval
from unidiffuser.modalities import Modality, all_parts
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.solver import DEFAULT_DETERMINISTIC, DEFAULT_SAMPLER, DETERMINISTIC, SAMPLERS, Callback, invert, solve
from unidiffuser.tasks import CHAINS, TASKS, Task, task_named
from unidiffuser.uvit import UViT

__all__ = ["DETERMINISTIC", "SAMPLERS", "NoiseSource", "Sampler", "default_sampler", "sample", "slerp"]


class NoiseSource:
    """Standard normal noise for all parts; each sample has a generator of its own.

    The numbers that a sample gets depend on its seed and on how many draws came before, never on the batch it is in, on the
    task, or on the device: they are drawn on the CPU.
    """

    def __init__(self, modalities: Sequence[Modality], seeds: Sequence[int], device: torch.device) -> None:
        self.parts, self.device = all_parts(modalities), device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self) -> dict[str, Tensor]:
        """Fresh noise by part, (B, *shape) in fp32."""
        rows = [[torch.randn(part.shape, generator=g) for part in self.parts] for g in self.generators]
        columns = zip(*rows, strict=True)
        return {part.name: torch.stack(c).to(self.device) for part, c in zip(self.parts, columns, strict=True)}


@dataclass(frozen=True)
class Sampler:
    """A network with everything that stays the same from one draw to the next; see ``sample`` for the fields."""

    model: nn.Module
    modalities: Sequence[Modality]
    schedule: NoiseSchedule
    steps: int
    guidance: float = 0.0
    sampler: str = DEFAULT_SAMPLER
    guidance_interval: tuple[int, int] | None = None
    data_type: int | None = None
    callback: Callback | None = None

    def draw(self, task: Task, noise: NoiseSource, condition: Mapping[str, Tensor], condition_t: int = 0) -> dict[str, Tensor]:
        """The parts of the modalities that ``task`` draws, given the clean parts ``condition``."""
        start = noise.draw()
        noise_of = self._noise_of(task, noise, condition, condition_t)
        drawn = {part.name: start[part.name] for part in self._parts(task.sample)}
        return solve(noise_of, drawn, self.schedule, self.steps, self.sampler, noise.draw, self.callback)

    def encode(self, task: Task, noise: NoiseSource, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The starting noise of the drawn parts of ``data``, given its others: ``decode`` makes them again from it."""
        drawn = {part.name: data[part.name] for part in self._parts(task.sample)}
        return invert(self._noise_of(task, noise, data, 0), drawn, self.schedule, self.steps, self.callback)

    def decode(
        self, task: Task, noise: NoiseSource, start: Mapping[str, Tensor], condition: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Like ``draw``, from a given starting noise."""
        noise_of = self._noise_of(task, noise, condition, 0)
        return solve(noise_of, start, self.schedule, self.steps, self.sampler, noise.draw, self.callback)

    def chain(self, names: Sequence[str], noise: NoiseSource, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tasks one after the other, each given what the one before drew; the parts of all of them."""
        drawn: dict[str, Tensor] = {}
        given = dict(condition)
        for name in names:
            given = self.draw(task_named(name, self.modalities), noise, given)
            drawn |= given
        return drawn

    def gibbs(self, noise: NoiseSource, condition: Mapping[str, Tensor], rounds: int) -> Iterator[dict[str, Tensor]]:
        """Blocked Gibbs sampling: every modality in turn, given all others; yields all parts after each round.

        Starts from ``condition``, which must hold all modalities but one, or from a joint sample if it is empty. The chain
        samples the joint distribution through conditionals alone.
        """
        names = [modality.name for modality in self.modalities]
        open_ = [m.name for m in self.modalities if any(part.name not in condition for part in m.parts)]
        if len(open_) == len(names):
            state = self.draw(Task(sample=tuple(names)), noise, {})
            order = names
        elif len(open_) == 1:
            state = dict(condition)
            order = [*open_, *(name for name in names if name not in open_)]
        else:
            raise ValueError(f"a Gibbs chain starts from nothing or from all modalities but one, {open_} are missing")
        for _ in range(rounds):
            for name in order:
                others = tuple(other for other in names if other != name)
                state = state | self.draw(Task(sample=(name,), given=others), noise, state)
            yield state

    def interpolate(self, ends: Mapping[str, Tensor], frames: int, seed: int, batch: int) -> dict[str, Tensor]:
        """``frames`` images from one to another, both included, with the texts between theirs.

        Each end is described (image to text), then encoded into its noise by the deterministic solver given that text. The
        frames start from spherical interpolations of both (section 6.3, interpolation of two images).

        Only the descriptions are guided. The way from an image to its noise and back is the flow of the network's own
        prediction: a guided way back would be another flow, and would not end at the image that was encoded.

        Args:
            ends: the parts of the image, (2, *shape).
            seed: of the noise, the same for both ends and all frames: what stands in for modalities that are left out must
                not differ on the way there and the way back, nor between neighbours.
            batch: rows of a network call, at most.
        """
        describe, depict = (task_named(name, self.modalities) for name in ("i2t", "t2i"))
        plain = replace(self, guidance=0.0)

        def noise(parts: Mapping[str, Tensor]) -> NoiseSource:
            first = next(iter(parts.values()))
            return NoiseSource(self.modalities, [seed] * len(first), first.device)

        def decoded(frames: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return plain.decode(depict, noise(frames), {name: frames[name] for name in starts}, frames)

        texts = in_batches(lambda given: self.draw(describe, noise(given), given), ends, batch)
        starts = in_batches(lambda data: plain.encode(depict, noise(data), data), {**ends, **texts}, batch)
        between = {
            name: torch.stack([slerp(pair[0], pair[1], fraction) for fraction in torch.linspace(0, 1, frames).tolist()])
            for name, pair in {**texts, **starts}.items()
        }
        return in_batches(decoded, between, batch) | {name: between[name] for name in texts}

    def _noise_of(self, task: Task, noise: NoiseSource, condition: Mapping[str, Tensor], condition_t: int) -> GuidedNoise:
        given_parts = self._parts(task.given)
        missing = [part.name for part in given_parts if part.name not in condition]
        if missing:
            raise ValueError(f"this task is given {', '.join(task.given)}: the condition lacks {', '.join(missing)}")
        stand_in, blur = noise.draw(), noise.draw()
        given = {
            part.name: self.schedule.add_noise(condition[part.name].to(noise.device).float(), blur[part.name], condition_t)
            for part in given_parts
        }
        return GuidedNoise(
            self.model, self.modalities, task, given, condition_t, stand_in,
            self.guidance, self.guidance_interval, self.schedule.steps, self.data_type,
        )  # fmt: skip

    def _parts(self, names: Sequence[str]) -> list:
        return [part for modality in self.modalities if modality.name in names for part in modality.parts]


def default_sampler(task: str | Task) -> str:
    """The sampler of a draw that names none."""
    return DEFAULT_DETERMINISTIC if task == "interpolate" else DEFAULT_SAMPLER


@torch.no_grad()
def sample(
    model: nn.Module,
    task: str | Task,
    modalities: Sequence[Modality],
    batch: int,
    steps: int,
    guidance: float,
    seeds: Sequence[int],
    sampler: str | None = None,
    condition: Mapping[str, Tensor] | None = None,
    condition_t: int = 0,
    guidance_interval: tuple[int, int] | None = None,
    data_type: int | None = None,
    rounds: int = 4,
    schedule: NoiseSchedule | None = None,
    callback: Callback | None = None,
) -> dict[str, Tensor]:
    """Draw one sample a seed.

    Args:
        model: a ``UViT``, or anything called alike; use evaluation mode, and autocast around the call if you want it.
        task: one of ``tasks.TASK_NAMES``, or a ``Task`` for other modalities.
        modalities: what is modelled. Grids may be declared in another size than the model's, which draws that size.
        batch: samples a network call, at most; it changes memory and speed, and the result by rounding only.
        steps: network calls a draw.
        guidance: scale s in c + s (c - u); 0 is none, the paper uses 7. (diffusers' pipeline counts from 1.)
        seeds: one a sample. For ``interpolate``, one a frame, of which the first counts.
        sampler: a name in ``SAMPLERS``; for ``interpolate`` in ``DETERMINISTIC``; ``default_sampler`` of the task if None.
        condition: clean given parts, (len(seeds), *shape); for ``interpolate`` the two images, (2, *shape).
        condition_t: noise the condition up to this timestep first, 0 .. 1000: 0 conditions fully, 1000 not at all. Only for a
            task of one draw that is given something: a chain's later draws are given what it drew itself.
        guidance_interval: guide only at timesteps from .. to.
        data_type: 0 or 1, for a model with a data-type token.
        rounds: rounds of ``gibbs``, 1 or more.
        schedule: the one that the model's configuration says it was trained with, or Stable Diffusion's, as in the paper, for a
            model without a configuration, if None.
        callback: called after every network call with the step of this draw (from 0), the timestep that the network was called
            with (1 .. 1000) and the drawn parts as they are then, (B, *shape) each. A chain has several draws, a batch its own.

    Returns:
        The drawn parts by name, (len(seeds), *shape) in fp32; chains return the parts of all their steps' results.

    Raises:
        ValueError: an unknown task or sampler, one that does not go with the task, a ``condition_t`` or an interval that means
            nothing, a condition that is missing, unknown or wrongly shaped.
    """
    condition, sampler = dict(condition or {}), sampler or default_sampler(task)
    schedule = schedule or (NoiseSchedule.of(model.config.noise) if isinstance(model, UViT) else NoiseSchedule())
    if not seeds or batch < 1 or rounds < 1:
        raise ValueError(f"give at least one seed, and a batch and rounds of 1 or more, not {len(seeds)}, {batch} and {rounds}")
    _check_condition_t(task, condition_t, schedule.steps)
    check_interval(guidance_interval, schedule.steps)
    if task == "interpolate" and sampler not in DETERMINISTIC:
        raise ValueError(f"interpolate goes back to the noise of its images: {sampler!r} cannot, {', '.join(DETERMINISTIC)} can")
    if task == "interpolate" and not condition:
        raise ValueError("interpolate is given two images: the condition is empty")
    rows = 2 if task == "interpolate" else len(seeds)
    shapes = {part.name: part.shape for part in all_parts(modalities)}
    for name, part in condition.items():
        if name not in shapes:
            raise ValueError(f"condition {name}: no such part; there are {', '.join(shapes)}")
        if tuple(part.shape) != (rows, *shapes[name]):
            raise ValueError(f"condition {name}: {tuple(part.shape)} where {task} takes {(rows, *shapes[name])}")
    device = next(model.parameters(), torch.empty(0)).device
    drawer = Sampler(model, modalities, schedule.to(device), steps, guidance, sampler, guidance_interval, data_type, callback)
    if task == "interpolate":
        ends = {name: part.to(device).float() for name, part in condition.items()}
        return drawer.interpolate(ends, len(seeds), seeds[0], batch)

    pieces = []
    for first in range(0, len(seeds), batch):
        noise = NoiseSource(modalities, seeds[first : first + batch], device)
        given = {name: part[first : first + batch] for name, part in condition.items()}
        if task == "gibbs":
            *_, drawn = drawer.gibbs(noise, given, rounds)
        elif isinstance(task, str) and task in CHAINS:
            drawn = drawer.chain(CHAINS[task], noise, given)
        else:
            drawn = drawer.draw(task_named(task, modalities), noise, given, condition_t)
        pieces.append(drawn)
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def in_batches(
    work: Callable[[dict[str, Tensor]], dict[str, Tensor]], parts: Mapping[str, Tensor], batch: int
) -> dict[str, Tensor]:
    """What ``work`` makes of parts (B, *shape), of which it is given ``batch`` rows at a time."""
    rows = len(next(iter(parts.values())))
    pieces = [work({name: part[first : first + batch] for name, part in parts.items()}) for first in range(0, rows, batch)]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _check_condition_t(task: str | Task, condition_t: int, last: int) -> None:
    if not 0 <= condition_t <= last:
        raise ValueError(f"condition_t must be in 0 .. {last}, not {condition_t}")
    single = TASKS.get(task) if isinstance(task, str) else task
    if condition_t and (single is None or not single.given):
        raise ValueError(f"condition_t goes with one draw that is given something, not with {task}")


def slerp(first: Tensor, second: Tensor, fraction: float) -> Tensor:
    """Spherical interpolation between two tensors of one shape, taken as vectors; 0 gives the first."""
    a, b = first.flatten(), second.flatten()
    cosine = torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=1e-12)
    angle = torch.acos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-4:  # parallel: the arc is a line
        return torch.lerp(first, second, fraction)
    return (torch.sin((1 - fraction) * angle) * first + torch.sin(fraction * angle) * second) / torch.sin(angle)
