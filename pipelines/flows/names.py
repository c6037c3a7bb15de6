"""What a run is called: as a person has typed it, else by what was changed, else as the recipe or the node."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stages.runner.recipe import Recipe

# The longest name that a list of runs shows on one line.
LENGTH = 60
# A name that the form puts there by itself is one of these words and an animal of at most six letters.
PREFECT_ADJECTIVES = (
    "Awesome", "Rustic", "Small", "Gorgeous", "Fantastic", "Sleek", "Intelligent", "Unbranded", "Refined", "Licensed", "Generic",
    "Practical", "Ergonomic", "Handcrafted", "Tasty", "Handmade", "Incredible",
)  # fmt: skip
_BY_THE_FORM = re.compile(rf"({'|'.join(PREFECT_ADJECTIVES)})-.{{2,6}}")


def is_made_up(name: str) -> bool:
    """Whether Prefect has made up a run's name: its form in the browser, or its server for a run that was given none."""
    if _BY_THE_FORM.fullmatch(name):
        return True
    words = name.split("-")
    return len(words) == 2 and all(word in _words_of_the_server() for word in words)


def _words_of_the_server() -> frozenset[str]:
    from coolname import data

    config: dict[str, Any] = data.config
    lists = [found[kind] for found in config.values() for kind in ("words", "phrases") if kind in found]
    return frozenset(word for found in lists for entry in found for word in ([entry] if isinstance(entry, str) else entry))


def name_of_changes(before: Recipe, after: Recipe, nodes: Iterable[str]) -> str:
    """What differs in the configuration of these nodes, such as ``min_aesthetic 5.5, steps 200``; empty when nothing does.

    A change that several nodes have in common is named once; where files lie, and what is a mapping, makes no name.
    """
    found: dict[str, None] = {}
    for node in nodes:
        if node in before.nodes and node in after.nodes:
            found |= dict.fromkeys(_changes(before.nodes[node].config, after.nodes[node].config))
    changes = list(found)
    for shown in range(len(changes), 0, -1):
        more = f" and {len(changes) - shown} more" if shown < len(changes) else ""
        if len(name := ", ".join(changes[:shown]) + more) <= LENGTH:
            return name
    return f"{changes[0][: LENGTH - 1]}…" if changes else ""


def _changes(old: BaseModel, new: BaseModel) -> Iterator[str]:
    """The fields that differ, by their last name."""
    for name, field in type(new).model_fields.items():
        before, after = getattr(old, name, None), getattr(new, name)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            yield from _changes(before, after)
        elif before != after and not isinstance(after, (dict, BaseModel)) and not _is_path(field):
            value = list(after) if isinstance(after, tuple) else after
            yield f"{name} {'none' if value is None else value}"


def _is_path(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("path"))
