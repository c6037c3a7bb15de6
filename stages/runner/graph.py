"""Fingerprints of a whole recipe, known before anything runs, and why a node is a hit, stale or a miss."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from infra.dataset import Dataset, InputRef, find, pointed
from infra.external import resolve
from infra.listing import OutsideError
from infra.sources import Sources, apart, content_of, other, together
from infra.store import NotThere, Store
from stages.catalog import stage_class
from stages.runner.contract import StageError, digest_of, result_fields
from stages.runner.keys import deciding
from stages.runner.recipe import Node, Recipe, RecipeError

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
    sources: Mapping[str, str]
    weights: dict[str, str]
    generation: int
    fingerprint: str
    state: State = "miss"
    reasons: list[str] = field(default_factory=list)
    lists: dict[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def all_sources(self) -> Mapping[str, str]:
        """Files from outside as address -> digest, whatever part they play."""
        return Sources.of(self.sources, *self.lists.values())


# Files from outside of a node: its sources, and its lists by the part they play, as address -> digest.
Found = tuple[Mapping[str, str], dict[str, Mapping[str, str]]]
Outside = Mapping[str, Found]


def plan(
    recipe: Recipe,
    store: Store,
    force: frozenset[str] = frozenset(),
    retry: frozenset[str] = frozenset(),
    outside: Outside | None = None,
) -> dict[str, Planned]:
    """Plan every node of a recipe; nothing runs and nothing is written, except that `force` and `retry` begin a new generation.

    A generation begun by `force` starts from nothing. One begun by `retry` has the generation before as its input ``parent``, and
    does again only what the stage says can end better.

    Args:
        outside: what an earlier plan found outside the store (`outside_of`), instead of looking again: files that have come since
            are none of a run's business that began before.

    Raises:
        RecipeError: a file or a folder of weights that the recipe names does not exist or cannot be used.
    """
    planned: dict[str, Planned] = {}
    for node in recipe.nodes.values():
        inputs = {name: InputRef(stage=planned[n].stage, fingerprint=planned[n].fingerprint) for name, n in node.inputs.items()}
        near = {name: recipe.nodes[n].config for name, n in node.inputs.items()}
        known = outside[node.name] if outside is not None else None
        planned[node.name] = plan_node(
            recipe.name, node, inputs, store, _before(recipe, node), near, node.name in force, node.name in retry, known
        )
    return planned


def plan_node(
    recipe: str,
    node: Node,
    inputs: Mapping[str, InputRef],
    store: Store,
    before: Mapping[str, Sequence[Any]],
    near: Mapping[str, Any],
    force: bool = False,
    retry: bool = False,
    outside: Found | None = None,
) -> Planned:
    """Plan one node, whose inputs are known; see `plan`.

    Args:
        before: stage -> configurations of the nodes that lead to it.
        near: input name -> configuration of the node that it is.

    Raises:
        RecipeError: as `plan`.
    """
    stage = stage_class(node.stage)
    try:
        if outside is not None:
            sources, lists = outside
        else:
            sources = resolve(stage.sources(node.config), store)
            lists = {part: resolve(patterns, store) for part, patterns in stage.lists(node.config).items()}
    except OutsideError as error:
        raise RecipeError(f"{_field(node, error.pattern)}: {error}") from None
    try:
        weights = stage.weights(node.config)
    except FileNotFoundError as error:
        raise RecipeError(f"{node.name}: {error}") from None
    try:
        known = {**inputs, **stage.datasets(node.config, store)}
    except NotThere as error:
        raise RecipeError(f"{node.place}.{stage.names_datasets}: {error}") from None
    identity = [
        stage.name, stage.version, deciding(node.config), {k: v.fingerprint for k, v in known.items()},
        content_of(sources), weights, *([{part: content_of(found) for part, found in lists.items()}] if lists else []),
        *([recipe, node.name] if node.forks_itself else []),
    ]  # fmt: skip
    base = digest_of(identity)
    generation, parent = _generation(store, base, force, retry)
    fingerprint = _fingerprint(base, generation)
    if parent:
        known["parent"] = InputRef(stage=stage.name, fingerprint=_fingerprint(base, generation - 1))
    draft = Planned(
        recipe, node.name, node.stage, node.config, known, dict(node.inputs), sources, weights, generation, fingerprint,
        lists=lists,
    )  # fmt: skip
    planned = _with_state(draft, recipe, store, stage.version)
    if outside is None and stage.check_refuses and planned.state != "hit":
        try:
            stage.check(node.config, sources, lists)
            stage.check_before(node.config, lists, before, near)
        except StageError as error:
            raise RecipeError(f"{node.name}: {error}") from None
    return planned


def _before(recipe: Recipe, node: Node) -> dict[str, list[BaseModel]]:
    """Stage -> configurations of the nodes that lead to one."""
    found: dict[str, list[BaseModel]] = {}
    waiting, seen = list(node.inputs.values()), set[str]()
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen.add(name)
            waiting += recipe.nodes[name].inputs.values()
            found.setdefault(recipe.nodes[name].stage, []).append(recipe.nodes[name].config)
    return found


def outside_of(planned: Mapping[str, Planned]) -> bytes:
    """What a plan found outside the store, as a file that `read_outside` reads."""
    parts: list[tuple[str, str | None, Mapping[str, str]]] = []
    for node in planned.values():
        parts += [(node.name, None, node.sources), *((node.name, part, found) for part, found in node.lists.items())]
    return together(parts)


def read_outside(data: bytes) -> Outside:
    """What `plan` takes as `outside`."""
    found: dict[str, Found] = {}
    for node, part, sources in apart(data):
        if part is None:
            found[node] = (sources, {})
        else:
            found[node][1][part] = sources
    return found


def _field(node: Node, pattern: str) -> str:
    """Where in the recipe a path, glob or URL is written, as well as can be told."""
    for name, value in node.config:
        if value == pattern or (isinstance(value, list) and pattern in value):
            return f"{node.place}.{name}"
    return node.place


def _fingerprint(base: str, generation: int) -> str:
    return digest_of([base, generation]) if generation else base


def _generation(store: Store, base: str, force: bool, retry: bool) -> tuple[int, bool]:
    """The generation, and whether it goes on from the one before it.

    It outlives the command that began it, or the next plain run would fall back to the old result.
    """
    path = f"nodes/generations/{base}.json"
    found = store.read_json(path) or {"generation": 0}
    if force or retry:
        found = {"generation": found["generation"] + 1, "retry": retry and not force}
        store.write_json(path, found)
    return int(found["generation"]), bool(found.get("retry"))


def _with_state(draft: Planned, recipe: str, store: Store, version: int) -> Planned:
    state: State
    if find(store, draft.stage, draft.fingerprint) is not None:
        state, reasons = "hit", []
    elif (before := pointed(store, recipe, draft.name)) is not None:
        state, reasons = "stale", changes(draft, before, version)
    else:
        state, reasons = "miss", ["never made"]
    return Planned(**{**draft.__dict__, "state": state, "reasons": reasons})


def changes(planned: Planned, before: Dataset, version: int) -> list[str]:
    """What differs between a planned node and the dataset that it gave last, a line each."""
    manifest = before.manifest
    lines = changed_fields(manifest.config, planned.config)
    if manifest.code["stage_version"] != version:
        lines.append(f"stage version {manifest.code['stage_version']} -> {version}")
    for name in sorted({*planned.inputs, *manifest.inputs} - {"parent"}):
        old, new = manifest.inputs.get(name), planned.inputs.get(name)
        if old != new:
            lines.append(f"input {name} ({planned.input_nodes.get(name, 'gone')}) is another dataset")
    new_files = Sources.of(planned.all_sources, planned.weights)
    gone, come = other(manifest.sources, new_files), other(new_files, manifest.sources)
    for name in sorted({*gone, *come}):
        if name not in gone:
            lines.append(f"new file {name}")
        elif name not in come:
            lines.append(f"file {name} is gone")
        else:
            lines.append(f"{name} has other content")
    if manifest.generation != planned.generation:
        why = "what failed is tried again" if "parent" in planned.inputs else "forced"
        lines.append(f"{why} (generation {planned.generation})")
    return lines or ["its dataset was removed"]


def changed_fields(old: Mapping[str, Any], config: BaseModel, without: Collection[str] = ()) -> list[str]:
    """What a configuration has otherwise than the one that was written down, as ``field: old -> new``, a line each.

    A field that was not there then is a change once it is set.

    Args:
        without: names of fields that do not count.
    """
    new, plain = result_fields(config), deciding(config)
    return [line for name in sorted({*old, *new} - {*without}) for line in _changes(name, name, old, new, plain)]


def _changes(place: str, name: Any, old: Mapping[Any, Any], new: Mapping[Any, Any], plain: Mapping[Any, Any]) -> list[str]:
    if name not in old and name not in plain:
        return []
    was, now = old.get(name), new.get(name)
    before, after = _parts(was), _parts(now)
    if before is None or after is None or (isinstance(was, list) and len(before) != len(after)):
        return [] if was == now else [f"{place}: {was!r} -> {now!r}"]
    below = _parts(plain.get(name)) or {}
    return [line for each in sorted({*before, *after}) for line in _changes(f"{place}.{each}", each, before, after, below)]


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """What a model's values, or a list of models', are looked into by."""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else None
