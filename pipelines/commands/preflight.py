"""What can be known of a run before anything starts: `run`, `deploy` and `--dry-run` ask it all at once, and say it in lines."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import cast

from pydantic import BaseModel

from infra.machine_kinds import why_none
from infra.machine_memory import gpu_bytes, machine_bytes
from infra.places import FIX, elsewhere, is_everywhere
from infra.processes import ServerError
from infra.ray_cluster import configured_ray
from infra.ray_jobs import RayJobs, user_token
from infra.store import Store, StoreError
from infra.store_access import check_in_time
from pipelines.commands.unseen import KINDS, unseen
from stages.catalog import stage_class
from stages.encode.stage import EncodeConfig
from stages.runner.contract import StageError, in_words
from stages.runner.graph import Planned
from stages.runner.ledger import chain_of, where_it_begins
from stages.runner.recipe import Node, Recipe, RecipeError
from stages.runner.run import check_disk, make_job
from stages.world.stage import CAPTION_WORDS, LATENT_SIDE, WorldConfig
from training.config import TrainConfig, workers_told
from training.footprint import footprint, too_much
from unidiffuser.availability import unavailable
from unidiffuser.references import Kind

# What has not answered after this many seconds is not waited for: a person hears of it within ten.
SECONDS = 8.0
# A machine that cannot hold this much could not run the program itself.
SMALL = 2**30
# Of the paper's encoders, which take no fewer: how many pixels of a side a latent's is, and the tokens of a caption.
REDUCTION, TEXT = 8, 77


class Doubt(Exception):
    """Something that stands in the way of some nodes, and of the others not: it is said, and the run goes on."""


Problem = RecipeError | StageError | StoreError | ServerError | Doubt
Check = Callable[[], Iterable[Problem]]


def check_store(store: Store, write: bool = True) -> None:
    """Whether the store can be used, and lies where the cluster can reach it; before it is looked into.

    Raises:
        StoreError: it cannot be used, or does not answer in time.
        ServerError: Ray is on other machines, and the store on this one.
    """
    if store.local and not is_everywhere(store.root) and (address := elsewhere()) is not None:
        raise ServerError(
            f"RAY_ADDRESS={address} is other machines, which cannot see {store.root}: name a store that all can, such as "
            f"--store s3://BUCKET/runs, {FIX}"
        )
    check_in_time(store, write, SECONDS)


def check_plan(recipe: Recipe, store: Store, planned: Mapping[str, Planned], chosen: Sequence[str], refuse: bool = True) -> None:
    """Look at all that the chosen nodes need besides the store, unless they are made; nothing that is near takes time.

    Prints a line for each thing that is doubtful, and for each but the last that is wrong; all are doubts unless they `refuse`.

    Raises:
        RecipeError, StageError: something is wrong, with one line that names it and the fix.
    """
    work = [name for name in chosen if planned[name].state != "hit"]
    nodes = {name: recipe.nodes[name] for name in work}
    checks: dict[str, Check] = {
        "space": lambda: _space(store, planned, work),
        "metadata": lambda: _outside(planned, work),
        "steps": lambda: chain_problems(store, planned, work),
        "places": lambda: unseen(nodes.values()),
        **{f"encoder {ref}": _encoder(fields, ref, kind) for (ref, kind), fields in _encoders(recipe, nodes.values()).items()},
    }
    late: dict[str, Problem] = {}
    if work and (address := configured_ray()) is not None:
        checks["ray"] = partial(_ray, address)
        late["ray"] = ServerError(
            f"no Ray Jobs API answers at {address} in {SECONDS:.0f} s; start the cluster, or unset RAY_ADDRESS"
        )
    if kinds := {name: kind for name, node in nodes.items() if (kind := getattr(node.config, "machines", None)) is not None}:
        checks["machines"] = lambda: _kinds(kinds)
    if trained := {name: node for name, node in nodes.items() if isinstance(node.config, TrainConfig)}:
        checks["memory"] = lambda: _memory(recipe, trained)
        checks["workers"] = lambda: _room(trained)
    wrong = []
    for problem in _at_once(checks, late):
        if isinstance(problem, Doubt) or not refuse:
            print(f"warning: {problem}", file=sys.stderr)
        else:
            wrong.append(problem)
    for problem in wrong[:-1]:
        print(f"error: {problem}", file=sys.stderr)
    if wrong:
        raise wrong[-1]


def _at_once(checks: Mapping[str, Check], late: Mapping[str, Problem] | None = None) -> Iterator[Problem]:
    """What the checks find, in their order; each has a thread of its own, which is left behind when it is late."""
    found: dict[str, list[Problem]] = {}

    def look(name: str, check: Check) -> None:
        try:
            found[name] = list(check())
        # A look that breaks must not keep the run from doing better.
        except Exception as error:
            found[name] = [Doubt(f"{name} could not be looked at before the run: {in_words(error)}")]

    threads = [threading.Thread(target=look, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    for name in checks:
        yield from found.get(name, [late[name]] if late and name in late else [])


def _ray(address: str) -> Iterator[Problem]:
    try:
        RayJobs(address, user_token()).check()
    except ServerError as error:
        yield error


def _space(store: Store, planned: Mapping[str, Planned], work: Sequence[str]) -> Iterator[Problem]:
    """Of the nodes whose inputs are there already, or not needed to tell; the others look when their turn comes."""
    for name in work:
        node = planned[name]
        try:
            check_disk(stage_class(node.stage), make_job(node, store, missing_ok=True))
        except StageError as error:
            yield error
        except KeyError:
            continue


def _outside(planned: Mapping[str, Planned], work: Sequence[str]) -> Iterator[Problem]:
    for name in work:
        node = planned[name]
        stage = stage_class(node.stage)
        if stage.check_refuses:
            continue
        try:
            stage.check(node.config, node.sources, node.lists)
        except StageError as error:
            yield Doubt(f"{name}: {error}")


def chain_lines(store: Store, planned: Mapping[str, Planned], chosen: Sequence[str]) -> list[str]:
    """For each chosen node that would begin or go on with a chain: at which step, and from what."""
    work = [name for name in chosen if planned[name].state != "hit"]
    return [line for line in _chains(store, planned, work) if isinstance(line, str)]


def chain_problems(store: Store, planned: Mapping[str, Planned], work: Sequence[str]) -> list[StageError]:
    """Why the chains of these nodes would not begin."""
    return [problem for problem in _chains(store, planned, work) if not isinstance(problem, str)]


def _chains(store: Store, planned: Mapping[str, Planned], work: Sequence[str]) -> Iterator[str | StageError]:
    """Where each chain would begin, as a line, or why it would not; nothing where that is not known before an input is made."""
    for name in work:
        node = planned[name]
        stage, job = stage_class(node.stage), make_job(node, store, missing_ok=True)
        for phase in stage.phases:
            if phase.gang is None:
                continue
            try:
                chain = chain_of(stage, phase, phase.gang, job, node)
            except StageError as error:
                yield error
            except KeyError as missing:
                yield f"{name}: where it begins is known once its input {missing.args[0]} is made"
            else:
                yield f"{name}: {where_it_begins(chain, node)}"


def _encoders(recipe: Recipe, nodes: Iterable[Node]) -> dict[tuple[str, Kind], list[str]]:
    """Reference and kind -> the fields of the recipe that name it."""
    found: dict[tuple[str, Kind], list[str]] = {}

    def walk(config: BaseModel, place: str, said: object) -> None:
        for field, value in config:
            own = said.get(field) if isinstance(said, dict) else None
            if isinstance(value, BaseModel):
                walk(value, f"{place}.{field}", own)
            elif field in KINDS and isinstance(value, str) and value != "embedded":
                fields = found.setdefault((value, KINDS[field]), [])
                name = f"encoders.{field}" if own is None else f"{place}.{field}"
                fields += [name] if name not in fields else []

    for node in nodes:
        said: object = recipe.document
        for part in node.place.split("."):
            said = said.get(part) if isinstance(said, dict) else None
        walk(node.config, node.place, said)
    return found


def _encoder(fields: list[str], ref: str, kind: Kind) -> Check:
    def check() -> Iterator[Problem]:
        try:
            why = unavailable(ref, kind)
        except FileNotFoundError as error:
            why = str(error)
        if why is not None:
            yield RecipeError(f"{', '.join(fields)}: {why}")

    return check


def _memory(recipe: Recipe, nodes: Mapping[str, Node]) -> Iterator[Problem]:
    """What training takes of a worker against the smallest one's memory, and whether there is a GPU to take memory off."""
    configs = {name: cast(TrainConfig, node.config) for name, node in nodes.items()}
    tokens = {name: _tokens(recipe, node) for name, node in nodes.items()}
    small = all(footprint(config, True, tokens[name]).device < SMALL for name, config in configs.items())
    if small and not any(config.zero.offloads for config in configs.values()):
        return
    try:
        where, machine, gpus = _workers()
    except ServerError:
        # Whether the cluster answers at all is asked when it is needed.
        return
    for name, config in configs.items():
        if config.zero.offloads and not gpus:
            yield StageError(
                f"{name}: zero.{config.zero.offloads} moves memory from a GPU to its machine, and {where} is no GPU; leave it out"
            )
            continue
        half = config.precision == "bf16" or (config.precision == "auto" and bool(gpus))
        samples = 1 if config.micro_batch == "auto" and gpus else None
        found, have = footprint(config, half, tokens[name], samples), min(gpus, default=machine)
        whose = f"{'a GPU' if gpus else 'the machine'} {where} has"
        if not gpus and where == "here" and (workers := config.fewest_workers) > 1:
            have, whose = have // workers, f"the machine {where} has for each of {workers} workers"
        if found.device > have:
            yield StageError(f"{name}: {too_much(config, found, have, whose)}")


def _room(nodes: Mapping[str, Node]) -> Iterator[Problem]:
    """Whether there are as many GPUs, or CPUs where there are none, as the workers that a training begins with at least."""
    if (address := configured_ray()) is None:
        cpus, gpus = os.cpu_count() or 1, len(gpu_bytes())
    else:
        try:
            cpus, gpus = RayJobs(address, user_token()).processors()
        except ServerError:
            return
    have, kind = (gpus, "GPU") if gpus else (cpus, "CPU")
    for name, node in nodes.items():
        config = cast(TrainConfig, node.config)
        if config.fewest_workers > have:
            told = f"{name}: workers is {workers_told(config)}, but {{where}} has {have} {kind}s; lower workers"
            # A cluster may grow.
            yield (
                Doubt(told.format(where=f"the cluster at {address}") + ", or add machines")
                if address
                else StageError(told.format(where="this machine"))
            )


def _kinds(nodes: Mapping[str, str]) -> Iterator[Problem]:
    """Whether there are machines of the kinds that nodes name, or may be: a node's turn may come in hours."""
    if (address := configured_ray()) is None:
        for name, kind in nodes.items():
            yield StageError(f"{name}: machines: this machine is no {kind}; leave it out, or name the cluster by RAY_ADDRESS")
        return
    try:
        have = RayJobs(address, user_token()).resources()
    except ServerError:
        # Whether the cluster answers at all is asked elsewhere.
        return
    for name, kind in nodes.items():
        if (why := why_none(kind, have)) is not None:
            yield StageError(f"{name}: machines: {why}")


def _tokens(recipe: Recipe, node: Node) -> int:
    """Tokens of a sample of a training: two timesteps, and those of the largest of its subsets."""
    patch = cast(TrainConfig, node.config).model.patch
    made = [recipe.nodes[name].config for input, name in node.inputs.items() if input.startswith("data.")]
    return 2 + max(_parts(config, patch) for config in made)


def _parts(config: BaseModel, patch: int) -> int:
    """Tokens of a row that a stage makes: of its latent, its text, and CLIP's embedding."""
    if isinstance(config, WorldConfig):
        return (LATENT_SIDE // patch) ** 2 + CAPTION_WORDS
    return (cast(EncodeConfig, config).size // REDUCTION // patch) ** 2 + TEXT + 1


def _workers() -> tuple[str, int, list[int]]:
    """Where the workers will be, the memory of the smallest machine there, and that of every GPU."""
    if (address := configured_ray()) is None:
        return "here", machine_bytes(), gpu_bytes()
    machines, gpus = RayJobs(address, user_token()).memory()
    return f"at {address}", min(machines), gpus
