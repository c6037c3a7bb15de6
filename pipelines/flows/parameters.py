"""What a deployment asks its user: the form of a recipe or of one node, and what the answers make of the recipe."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
            raise RecipeError(f"config.{name}: the recipe {recipe.name} has no such node; it has {', '.join(recipe.nodes)}")
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
    if node.stage == "train":
        keys = ["train", node.name.removeprefix("train-")]
    elif node.name == node.stage:
        # `text_codec` is as good as `text-codec`.
        keys = [node.stage if node.stage in document else node.stage.replace("-", "_")]
    else:
        keys = ["subsets", node.name.removesuffix(f"-{node.stage}"), node.stage]
    for key in keys[:-1]:
        document = document[key]
    # A stage without any field may be written as nothing at all.
    document[keys[-1]] = document[keys[-1]] or {}
    return document[keys[-1]]


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


def recipe_form(recipe: Recipe) -> dict[str, Any]:
    """JSON schema of the end-to-end flow's parameters, with the recipe's nodes to choose from and its values as defaults."""
    names = list(recipe.nodes)
    fields = Choice.model_json_schema()["properties"]
    for name in ("only", "force"):
        fields[name]["items"] = {"type": "string", "enum": names}
    for name in ("from", "until"):
        fields[name] = {"title": name.title(), "description": fields[name]["description"], "type": "string", "enum": names}
    nodes = {"type": "object", "description": inspect.getdoc(Choice), "properties": fields, "additionalProperties": False}
    config = {
        "type": "object",
        "description": "Another value for a field of a node: that node is made anew, and what follows from it.",
        "properties": {name: node_fields(node) for name, node in recipe.nodes.items()},
        "additionalProperties": False,
    }
    jobs = {"type": "integer", "minimum": 1, "default": recipe.deploy.jobs, "description": "How many nodes work at a time."}
    return _form({"nodes": nodes, "config": config, "jobs": jobs, **_COMMON})


def node_form(node: Node) -> dict[str, Any]:
    """JSON schema of the parameters of one node's flow."""
    force = {"type": "boolean", "default": False, "description": "Make it again, although nothing that decides it has changed."}
    name = {"type": "string", "enum": [node.name], "default": node.name, "description": "The node."}
    return _form({"config": node_fields(node), "force": force, **_COMMON, "node": name})


_COMMON: dict[str, dict[str, Any]] = {
    "overrides": {
        "type": "array",
        "items": {"type": "string", "pattern": "^[^=]+="},
        "default": [],
        "description": "Further fields of the recipe, as --set takes them: a.b=c.",
    },
    "recipe": {"type": "string", "description": "The recipe: a YAML file, or the copy that `unidiffuser deploy` made of it."},
    "store": {"type": "string", "description": "Folder or fsspec URL of the datasets."},
}


def _form(properties: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Prefect shows the fields by `position`."""
    placed = {name: {"title": name, **field, "position": n} for n, (name, field) in enumerate(properties.items())}
    return {"title": "Parameters", "type": "object", "properties": placed, "required": ["recipe"], "additionalProperties": False}


def node_fields(node: Node) -> dict[str, Any]:
    """The form of a node's configuration: the stage's fields with descriptions and bounds, and this recipe's values."""
    schema = type(node.config).model_json_schema()
    definitions = schema.pop("$defs", {})
    fields = _filled(_inlined(schema, definitions), node.config.model_dump(mode="json"))
    return {"description": f"Fields of the stage {node.stage}.", **fields, "title": node.name}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema with definitions put in place, since nodes of a stage differ in their defaults; pairs become lists of two."""
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if reference := schema.get("$ref"):
        schema = {**definitions[reference.rsplit("/", 1)[-1]], **{name: part for name, part in schema.items() if name != "$ref"}}
    places = schema.get("prefixItems", [])
    if places and all(place == places[0] for place in places):
        schema = {**{name: part for name, part in schema.items() if name != "prefixItems"}, "items": places[0]}
    return {name: _inlined(part, definitions) for name, part in schema.items()}


def _filled(schema: Mapping[str, Any], value: Any) -> dict[str, Any]:
    """The schema with the value as its defaults. A field that is left out keeps the recipe's value, so none is required."""
    if "properties" not in schema:
        return {**schema, "default": value}
    properties: Mapping[str, Any] = schema["properties"]
    kept = {name: part for name, part in schema.items() if name not in ("required", "default")}
    return {**kept, "properties": {name: _filled(field, value[name]) for name, field in properties.items()}}
