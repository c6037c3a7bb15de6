"""Which nodes of a recipe a command is about: --only, --from, --until."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.runner.contract import StageError
from stages.runner.graph import Planned
from stages.runner.recipe import Recipe


def select_nodes(recipe: Recipe, only: Sequence[str] = (), start: str | None = None, until: str | None = None) -> list[str]:
    """The chosen nodes in an order in which they can run; a bare stage name means all its nodes.

    Raises:
        RecipeError: there is no such node.
    """
    chosen = set(recipe.nodes)
    if only:
        chosen = {node for wanted in only for node in recipe.select(wanted)}
    if start is not None:
        chosen &= _closure(recipe.select(start), _followers(recipe))
    if until is not None:
        chosen &= _closure(recipe.select(until), {name: list(node.inputs.values()) for name, node in recipe.nodes.items()})
    return [name for name in recipe.nodes if name in chosen]


def _followers(recipe: Recipe) -> dict[str, list[str]]:
    after: dict[str, list[str]] = {name: [] for name in recipe.nodes}
    for name, node in recipe.nodes.items():
        for before in node.inputs.values():
            after[before].append(name)
    return after


def _closure(names: Sequence[str], edges: Mapping[str, Sequence[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += edges[name]
    return found


def check_inputs(planned: Mapping[str, Planned], chosen: Sequence[str]) -> None:
    """What is left out must be committed already where a chosen node needs it.

    Raises:
        StageError: it is not; names the node and the way to make it.
    """
    for name in chosen:
        if planned[name].state == "hit":
            continue
        for before in planned[name].input_nodes.values():
            if before not in chosen and planned[before].state != "hit":
                why = "; ".join(planned[before].reasons)
                raise StageError(f"{name}: its input {before} is not made ({why}); run with --from {before}")
