"""What a deployment asks its user, and what the answers make of the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.nearest import nearest
from stages.runner.recipe import Node, Recipe, RecipeError, explain, parse_recipe


class Choice(BaseModel):
    """Which nodes to run. What is committed and unchanged is reused whatever is chosen here."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    only: list[str] = Field([], description="Only these nodes; empty: all.")
    start: str | None = Field(None, alias="from", description="This node and what follows from it.")
    until: str | None = Field(None, description="This node and what it needs.")
    force: list[str] = Field([], description="Make these nodes again, although nothing that decides them has changed.")


def choice(values: Any) -> Choice:
    """Check the answers to `nodes`.

    Raises:
        RecipeError: names the field.
    """
    try:
        return values if isinstance(values, Choice) else Choice.model_validate(values or {})
    except ValidationError as error:
        raise RecipeError(explain(error, "nodes")) from None


def changed(recipe: Recipe, config: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe with other values for some fields of some nodes; a value that is the recipe's own changes nothing.

    Raises:
        RecipeError: there is no such node or field, or a value is of the wrong type or out of bounds.
    """
    document, fresh = deepcopy(recipe.document), False
    for name, values in config.items():
        if name not in recipe.nodes:
            raise RecipeError(f"config.{name}: the recipe {recipe.name} has no such node{nearest(name, recipe.nodes)}")
        if not isinstance(values, Mapping):
            raise RecipeError(f"config.{name}: expected a mapping of fields, got {values!r}")
        if differences := _differences(recipe.nodes[name].config, values):
            _merge(_place(document, recipe.nodes[name]), differences, recipe.nodes[name].config)
            fresh = True
    return parse_recipe(document, recipe.folder) if fresh else recipe


def _differences(config: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values that are not the config's own; a field that is a model of its own is compared field by field."""
    own, found = config.model_dump(mode="json"), {}
    for name, value in values.items():
        part = getattr(config, name, None)
        if isinstance(part, BaseModel) and isinstance(value, Mapping):
            if below := _differences(part, value):
                found[name] = below
        elif name not in own or own[name] != value:
            found[name] = value
    return found


def _place(document: dict[str, Any], node: Node) -> dict[str, Any]:
    """Where a node's fields are written in the document."""
    keys = _keys(document, node)
    for key in keys[:-1]:
        document = document[key]
    # A stage without any field may be written as nothing at all.
    document[keys[-1]] = document[keys[-1]] or {}
    return document[keys[-1]]


def place_of(document: Mapping[str, Any], node: Node) -> Mapping[str, Any]:
    """The fields that the document itself sets for a node."""
    found: Any = document
    for key in _keys(document, node):
        found = found[key]
    return found or {}


def _keys(document: Mapping[str, Any], node: Node) -> list[str]:
    if node.stage == "train":
        return ["train", node.name.removeprefix("train-")]
    if node.name == node.stage:
        # `text_codec` is as good as `text-codec`.
        return [node.stage if node.stage in document else node.stage.replace("-", "_")]
    return ["subsets", node.name.removesuffix(f"-{node.stage}"), node.stage]


def _merge(place: dict[str, Any], values: Mapping[str, Any], config: BaseModel) -> None:
    """Write values into the document; a field that is a model of its own field by field, a mapping that is a value as a whole."""
    for name, value in values.items():
        part = getattr(config, name, None)
        if isinstance(part, BaseModel) and isinstance(place.get(name), list):
            # The short form of a training stage's `data`.
            place[name] = {"subsets": place[name]}
        if isinstance(part, BaseModel) and isinstance(value, Mapping) and isinstance(place.get(name), dict):
            _merge(place[name], value, part)
        else:
            place[name] = value


def values_of(recipe: Recipe, nodes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The values of every field of these nodes: what the form shows, and what a run says that it ran with."""
    return {name: recipe.nodes[name].config.model_dump(mode="json") for name in nodes}
