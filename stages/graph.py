"""Fingerprints of a whole recipe, known before anything runs, and why a node is a hit, stale or a miss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from infra.dataset import Dataset, InputRef, find, pointed
from infra.external import resolve
from infra.store import Store
from stages.catalog import stage_class
from stages.contract import digest_of, result_fields
from stages.recipe import Recipe, RecipeError

State = Literal["hit", "stale", "miss"]


@dataclass(frozen=True)
class Planned:
    """A node whose fingerprint is known.

    `state` says whether its dataset is committed (hit), an older one of the same node is (stale), or none (miss);
    `reasons` says which field, input, file or version made it so.
    """

    recipe: str
    name: str
    stage: str
    config: BaseModel
    inputs: dict[str, InputRef]
    input_nodes: dict[str, str]
    sources: dict[str, str]
    weights: dict[str, str]
    generation: int
    fingerprint: str
    state: State = "miss"
    reasons: list[str] = field(default_factory=list)


def plan(recipe: Recipe, store: Store, force: frozenset[str] = frozenset()) -> dict[str, Planned]:
    """Plan every node of a recipe; nothing runs and nothing is written, except that `force` begins a new generation.

    Raises:
        RecipeError: a file that the recipe names does not exist.
    """
    planned: dict[str, Planned] = {}
    for node in recipe.nodes.values():
        stage = stage_class(node.stage)
        try:
            sources = resolve(stage.sources(node.config), store)
        except FileNotFoundError as error:
            raise RecipeError(f"{node.name}: {error}: no such file; expected a path, glob or URL that exists") from None
        weights = stage.weights(node.config)
        inputs = {name: InputRef(stage=planned[n].stage, fingerprint=planned[n].fingerprint) for name, n in node.inputs.items()}
        identity = [
            stage.name, stage.version, result_fields(node.config), {k: v.fingerprint for k, v in inputs.items()},
            _by_content(sources), weights,
        ]  # fmt: skip
        base = digest_of(identity)
        generation = _generation(store, base, node.name in force)
        fingerprint = digest_of([base, generation]) if generation else base
        draft = Planned(
            recipe.name,
            node.name,
            node.stage,
            node.config,
            inputs,
            dict(node.inputs),
            sources,
            weights,
            generation,
            fingerprint,
        )
        planned[node.name] = _with_state(draft, recipe, store, stage.version)
    return planned


def _by_content(sources: dict[str, str]) -> list[tuple[str, str]]:
    """Name without folder, and digest: a recipe gives the same datasets wherever its files lie."""
    return sorted((address.rsplit("/", 1)[-1], digest) for address, digest in sources.items())


def _generation(store: Store, base: str, force: bool) -> int:
    """The generation of a forced rerun outlives the command, or the next plain run would fall back to the old result."""
    path = f"nodes/generations/{base}.json"
    generation = (store.read_json(path) or {"generation": 0})["generation"]
    if force:
        generation += 1
        store.write_json(path, {"generation": generation})
    return int(generation)


def _with_state(draft: Planned, recipe: Recipe, store: Store, version: int) -> Planned:
    state: State
    if find(store, draft.stage, draft.fingerprint) is not None:
        state, reasons = "hit", []
    elif (before := pointed(store, recipe.name, draft.name)) is not None:
        state, reasons = "stale", changes(draft, before, version)
    else:
        state, reasons = "miss", ["never made"]
    return Planned(**{**draft.__dict__, "state": state, "reasons": reasons})


def changes(planned: Planned, before: Dataset, version: int) -> list[str]:
    """What differs between a planned node and the dataset that it gave last, a line each."""
    manifest = before.manifest
    lines = _config_changes("", manifest.config, result_fields(planned.config))
    if manifest.code["stage_version"] != version:
        lines.append(f"stage version {manifest.code['stage_version']} -> {version}")
    for name in sorted({*planned.inputs, *manifest.inputs}):
        old, new = manifest.inputs.get(name), planned.inputs.get(name)
        if old != new:
            lines.append(f"input {name} ({planned.input_nodes.get(name, 'gone')}) is another dataset")
    old_files = {name.rsplit("/", 1)[-1]: digest for name, digest in manifest.sources.items()}
    new_files = dict(_by_content(planned.sources)) | planned.weights
    for name in sorted({*old_files, *new_files}):
        if name not in old_files:
            lines.append(f"new file {name}")
        elif name not in new_files:
            lines.append(f"file {name} is gone")
        elif old_files[name] != new_files[name]:
            lines.append(f"{name} has other content")
    if manifest.generation != planned.generation:
        lines.append(f"forced (generation {planned.generation})")
    return lines or ["its dataset was removed"]


def _config_changes(place: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            lines += _config_changes(f"{place}.{key}" if place else key, old.get(key), new.get(key))
        return lines
    return [] if old == new else [f"{place}: {old!r} -> {new!r}"]
