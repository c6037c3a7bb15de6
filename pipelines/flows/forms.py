"""The form of a deployment: JSON schemas from which Prefect draws it, and by which it checks what is sent.

A form shows which nodes run and the fields that the recipe's file itself sets, a tab a node; every other field is accepted too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from pipelines.flows.parameters import Choice, place_of
from stages.catalog import ROW_STAGES
from stages.runner.recipe import Node, Recipe

AS_WRITTEN = "as in the recipe"


def recipe_form(recipe: Recipe) -> dict[str, Any]:
    """JSON schema of the end-to-end flow's parameters, with the recipe's nodes to choose from and its values as defaults."""
    names = list(recipe.nodes)
    fields = Choice.model_json_schema()["properties"]
    for name in ("only", "force"):
        fields[name]["items"] = {"type": "string", "enum": names}
    for name in ("from", "until"):
        fields[name] = {"title": name.title(), "description": fields[name]["description"], "type": "string", "enum": names}
    nodes = {"type": "object", "description": inspect.getdoc(Choice), "properties": fields, "additionalProperties": False}
    jobs = {"type": "integer", "minimum": 1, "default": recipe.deploy.jobs, "description": "How many nodes work at a time."}
    strict = {name: node_fields(node) for name, node in recipe.nodes.items()}
    config = {
        "title": "Other values",
        "description": "A node with another value is made anew, and what follows from it. The open tab counts; "
        "fields of further nodes go to Overrides.",
        **_folded(_tabs(recipe), {"type": ["object", "null"], "properties": strict, "additionalProperties": False}),
    }
    return _form({"nodes": nodes, "config": config, "overrides": _OVERRIDES, "jobs": jobs}, {})


def node_form(recipe: Recipe, node: Node) -> dict[str, Any]:
    """JSON schema of the parameters of one node's flow."""
    strict = node_fields(node)
    shown = written_fields(recipe, node)
    tabs = [{"title": "other values", "type": "object", "properties": shown}] if shown else []
    properties = {
        "config": {
            "title": "Other values",
            "description": f"With another value {node.name} is made anew. The open tab counts.",
            **_folded(tabs, {**strict, "type": ["object", "null"]}),
        },
        "follow": {
            "type": "boolean",
            "default": False,
            "title": "And what follows",
            "description": "Then every node that needs it.",
        },
        "force": {
            "type": "boolean",
            "default": False,
            "description": "Make it again, although nothing that decides it has changed.",
        },
        "overrides": _OVERRIDES,
    }
    return _form(properties, {"node": {"type": "string", "enum": [node.name]}})


_OVERRIDES: dict[str, Any] = {
    "type": "array",
    "items": {"type": "string", "pattern": "^[^=]+=", "title": "a.b=c", "description": "A field by its place in the file."},
    "default": [],
    "description": "Any field of the recipe by its place in the file, as --set takes it: subsets.NAME.filter.min_aesthetic=5.5",
}
# What the deployment says and nobody changes in a form: accepted, and not shown.
_HIDDEN = {"recipe": {"type": "string"}, "store": {"type": "string"}}


def _form(properties: dict[str, dict[str, Any]], hidden: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Prefect shows `properties`, by `position`."""
    placed = {name: {"title": name.title(), **field, "position": n} for n, (name, field) in enumerate(properties.items())}
    accepted = {f"^{name}$": field for name, field in {**_HIDDEN, **hidden}.items()}
    return {
        "title": "Parameters",
        "type": "object",
        "properties": placed,
        "patternProperties": accepted,
        "required": ["recipe"],
        "additionalProperties": False,
    }


def _folded(tabs: list[dict[str, Any]], strict: dict[str, Any]) -> dict[str, Any]:
    """A part of the form that opens by a tab. Prefect draws `anyOf`, whose last tab takes whatever JSON there is, so that it is
    `allOf` that refuses, by the name of the field."""
    return {
        "default": None,
        "anyOf": [{"title": AS_WRITTEN, "type": "null"}, *tabs, {"title": "JSON", "description": "All of it, as JSON."}],
        "allOf": [strict],
    }


def _tabs(recipe: Recipe) -> list[dict[str, Any]]:
    """A tab a subset or section of the recipe's file, and in it a tab a node, where there are several."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for node in recipe.nodes.values():
        if shown := written_fields(recipe, node):
            group, name = _group(node)
            fields = {"title": node.name, "description": node_fields(node)["description"], "type": "object", "properties": shown}
            groups.setdefault(group, []).append({"title": name, "type": "object", "properties": {node.name: fields}})
    return [
        {**tabs[0], "title": group}
        if len(tabs) == 1
        # By `properties` Prefect finds the tab that a value belongs to.
        else {"title": group, "type": "object", "properties": _joined(tabs), "anyOf": tabs}
        for group, tabs in groups.items()
    ]


def _joined(tabs: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: {} for tab in tabs for name in tab["properties"]}


def _group(node: Node) -> tuple[str, str]:
    """The subset or section that a node is written in, and its name there."""
    if node.stage in ROW_STAGES:
        return node.name.removesuffix(f"-{node.stage}"), node.stage
    return node.stage, node.name.removeprefix(f"{node.stage}-")


def written_fields(recipe: Recipe, node: Node) -> dict[str, Any]:
    """The schemas of those fields that the recipe's file sets for a node, with its values as defaults."""
    return _written(node_fields(node)["properties"], node.config, place_of(recipe.document, node))


def _written(fields: Mapping[str, Any], config: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    shown = {}
    for name, field in fields.items():
        part = getattr(config, name)
        if name not in values:
            continue
        if isinstance(part, BaseModel):
            # The short form of a training stage's `data` names subsets, which are no field.
            below = values[name] if isinstance(values[name], Mapping) else {}
            if inner := _written(field["properties"], part, below):
                shown[name] = {**field, "properties": inner}
        else:
            shown[name] = _of_the_values_kind(field, part)
    return shown


def _of_the_values_kind(field: dict[str, Any], value: Any) -> dict[str, Any]:
    """A field that may be null, and is not, without the choice between the two: `overrides` take null."""
    kinds = [kind for kind in field.get("anyOf", []) if kind.get("type") != "null"]
    if value is None or len(kinds) != 1:
        return field
    return {**{name: part for name, part in field.items() if name != "anyOf"}, **kinds[0], "title": field["title"]}


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
    if "oneOf" in schema:
        # A choice by `kind`: the form shows the one that the recipe has chosen.
        schema = next(one for one in schema["oneOf"] if one["properties"]["kind"]["const"] == value["kind"])
    if "properties" not in schema:
        return {**schema, "default": value}
    properties: Mapping[str, Any] = schema["properties"]
    kept = {name: part for name, part in schema.items() if name not in ("required", "default")}
    # What a node begins from is wiring, as its inputs are, and no value of it.
    filled = {name: {**_filled(field, value[name]), "title": _title(name)} for name, field in properties.items() if name in value}
    return {**kept, "properties": filled}


def _title(field: str) -> str:
    return field.replace("_", " ").title()
