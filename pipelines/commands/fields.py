"""`unidiffuser fields`: every field of a recipe, read from the models that check it; docs/fields.md is the same as a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from infra.nearest import nearest
from pipelines.commands.checkpoints import Misuse
from stages.catalog import stage_class
from stages.runner.contract import Stage
from stages.runner.recipe import Document, Encoders

# Section -> where it is written in a recipe; those of stages have the stage's name.
PLACES = {
    "recipe": "",
    **{name: f"subsets.SUBSET.{name}" for name in ("select", "download", "folder", "filter", "encode", "world")},
    "text-codec": "text-codec",
    "train": "train.NAME",
    "evaluate": "evaluate",
    "export": "export",
}
# What the recipe itself takes out of a section: the stages get datasets instead.
WIRING: dict[str, list[tuple[str, str, str | None, str]]] = {
    "recipe": [
        ("subsets.SUBSET.from", "text", "null", "the node whose rows the subset takes, instead of a select or folder of its own")
    ],
    "text-codec": [("captions", "text", None, "the subset whose captions it learns")],
    "train": [
        (
            "data",
            "list of text or mapping",
            None,
            "the subsets to train on, or a mapping with them as `subsets` and the fields below",
        ),
    ],
}
_SIGNS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


@dataclass(frozen=True)
class FieldRow:
    """A field: `name` with dots for what lies in a mapping, `type` in words, `default` as in YAML (None: it must be given)."""

    section: str
    name: str
    type: str
    default: str | None
    description: str


def fields(section: str) -> list[FieldRow]:
    """The fields of a section, in the order of their model."""
    model: type[BaseModel] = Document if section == "recipe" else stage_class(section).Config
    schema = model.model_json_schema(by_alias=True)
    wired = [FieldRow(section, *values) for values in WIRING.get(section, ())]
    names = {row.name for row in wired}
    rows = [row for row in _rows(section, schema, schema.get("$defs", {}), "") if row.name not in names]
    return rows + wired if section == "recipe" else wired + rows


def _rows(section: str, schema: Mapping[str, Any], models: Mapping[str, Any], under: str) -> Iterator[FieldRow]:
    required = schema.get("required", ())
    for name, spec in schema.get("properties", {}).items():
        inner, listed = _model_of(spec, models)
        default = None if name in required else _default(spec)
        if not under and name in Encoders.model_fields and section != "recipe":
            default = f"encoders.{name}"
        about = spec.get("description") or (inner or {}).get("description", "")
        yield FieldRow(section, f"{under}{name}", _type_of(spec, models), default, " ".join(about.split()))
        if inner is not None:
            yield from _rows(section, inner, models, f"{under}{name}{'[]' if listed else ''}.")
        each = spec.get("items", {})
        if "oneOf" in each:
            yield from _rows_by_kind(section, each, models, f"{under}{name}[].", None)
        else:
            yield from _rows_by_kind(section, spec, models, f"{under}{name}.", 0)


def _model_of(spec: Mapping[str, Any], models: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, bool]:
    """The model that a field's value is, and whether it is a list of them."""
    for part in (spec, *spec.get("allOf", ()), *spec.get("anyOf", ())):
        listed = part.get("type") == "array" and isinstance(part.get("items"), dict)
        reference = (part["items"] if listed else part).get("$ref")
        if reference and "properties" in (model := models[reference.rpartition("/")[2]]):
            return model, listed
    return None, False


def _rows_by_kind(
    section: str, spec: Mapping[str, Any], models: Mapping[str, Any], under: str, default: int | None
) -> Iterator[FieldRow]:
    """The fields of a mapping that is one of several by its `kind`, of which the one of this number is the default."""
    choices = [models[one["$ref"].rpartition("/")[2]] for one in spec.get("oneOf", ())]
    kinds = [choice["properties"]["kind"] for choice in choices]
    if kinds:
        about = "; ".join(f"{kind['const']}: {kind['description'].rstrip('.')}" for kind in kinds)
        yield FieldRow(
            section, f"{under}kind", " or ".join(kind["const"] for kind in kinds),
            None if default is None else json.dumps(kinds[default]["const"]), about,
        )  # fmt: skip
    for choice, kind in zip(choices, kinds, strict=True):
        for row in _rows(section, choice, models, under):
            if row.name != f"{under}kind":
                yield replace(row, description=f"Of kind {kind['const']}: {row.description}")


def _default(spec: Mapping[str, Any]) -> str:
    value = spec.get("default", {})
    # A mapping's default is that of each of its fields.
    return "" if isinstance(value, dict) else json.dumps(value, ensure_ascii=False)


def _type_of(spec: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    if "oneOf" in spec:
        return "mapping, by its kind"
    if "$ref" in spec:
        target = models[spec["$ref"].rpartition("/")[2]]
        return "mapping" if "properties" in target else _type_of(target, models)
    if "anyOf" in spec or "allOf" in spec:
        return " or ".join(dict.fromkeys(_type_of(part, models) for part in spec.get("anyOf") or spec["allOf"]))
    if "enum" in spec or "const" in spec:
        return " or ".join(map(str, spec.get("enum", [spec.get("const")])))
    if spec.get("type") == "array":
        of = [_type_of(part, models) for part in spec.get("prefixItems", [spec.get("items", {})])]
        return f"list of {of[0]}" if "prefixItems" not in spec else f"list: {', '.join(of)}"
    if spec.get("type") == "object":
        return "mapping"
    bounds = [f"{word} {spec[key]:g}" for key, word in _SIGNS.items() if key in spec]
    return ", ".join([_WORDS.get(spec.get("type", ""), "any value"), *bounds])


def sections_of(node: str | None) -> list[str]:
    """The sections that a stage's name, a node's name or none (all of them) means.

    Raises:
        Misuse: there is no such stage.
    """
    if node is None:
        return list(PLACES)
    # A node is called SUBSET-STAGE or train-NAME.
    found = [
        name for name in PLACES if node == name or node.endswith(f"-{name}") or (name == "train" and node.startswith("train-"))
    ]
    if not found:
        raise Misuse(f"{node}: no stage or node of a recipe{nearest(node, PLACES)}")
    return [max(found, key=len)]


def title_of(section: str) -> tuple[str, str]:
    """A section's heading, and what it is in one sentence."""
    if section == "recipe":
        return "recipe", "The outer fields; those of the stages follow below."
    stage: type[Stage] = stage_class(section)
    module = __import__(stage.__module__, fromlist=["_"])
    about = " ".join((module.__doc__ or "").partition("\n\n")[0].split()).partition(": ")[2]
    return f"{section} (`{PLACES[section]}`)", f"{about[:1].upper()}{about[1:]}"


def show(node: str | None, console: Console) -> None:
    """Print the fields with what they are for, each under its name: readable at any width."""
    for section in sections_of(node):
        console.print(Text(PLACES[section] or "recipe", style="bold"))
        for row in fields(section):
            default = "must be given" if row.default is None else f"default {row.default}" if row.default else ""
            console.print(Text.assemble("  ", (row.name, "cyan"), f"  {row.type}", (f"  {default}" if default else "", "dim")))
            if row.description:
                console.print(Padding(Text(row.description), (0, 0, 0, 6), expand=False))


def as_json(node: str | None) -> list[dict[str, Any]]:
    return [asdict(row) for section in sections_of(node) for row in fields(section)]


def page() -> str:
    """docs/fields.md."""
    lines = [
        "# Every field of a recipe",
        "",
        "Written by `unidiffuser fields --page` from the models that check a recipe; `unidiffuser fields NODE` prints a part.",
        "A field without a default must be given. `[]` is each entry of a list.",
    ]
    for section in PLACES:
        title, about = title_of(section)
        lines += ["", f"## {title}", "", about, "", "| field | value | default | what it is |", "|---|---|---|---|"]
        for row in fields(section):
            default = "" if row.default is None else f"`{row.default}`" if row.default else ""
            lines.append(f"| `{row.name}` | {row.type} | {default} | {row.description.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"
