"""Which of this machine's files a recipe names, where the work is done by others, which cannot see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from pydantic import BaseModel

from infra.places import FIX, elsewhere, is_everywhere
from stages.runner.recipe import Node, RecipeError
from unidiffuser.references import Kind, local_folder

# The fields that name weights, and what they name.
KINDS: dict[str, Kind] = {"vae": "vae", "clip": "clip", "text": "clip", "gpt2": "gpt2"}


def unseen(nodes: Iterable[Node]) -> Iterator[RecipeError]:
    """What nodes name of this machine's own files, where others do the work."""
    named = [(node, *found) for node in nodes for found in local_files(node.config, node.place)]
    if named and (address := elsewhere()) is not None:
        for _, field, path in named:
            yield RecipeError(
                f"{field}: RAY_ADDRESS={address} is other machines, which cannot see {path}: name an address that all can, "
                f"such as s3://BUCKET/..., {FIX}"
            )


def local_files(config: BaseModel, place: str) -> Iterator[tuple[str, str]]:
    """Field and value of what a configuration names of this machine's files that not every machine has."""
    for field, value in config:
        if isinstance(value, BaseModel):
            yield from local_files(value, f"{place}.{field}")
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str) and _is_here(field, each) and not is_everywhere(each.removeprefix("file://")):
                yield f"{place}.{field}", each


def _is_here(field: str, value: str) -> bool:
    """Whether a value is a path, with or without wildcards, or weights in a folder."""
    if field in KINDS:
        try:
            return value != "embedded" and local_folder(value, KINDS[field]) is not None
        except FileNotFoundError:
            return False
    path = Path(value.removeprefix("file://")).expanduser()
    fixed = list(takewhile(lambda part: not set(part) & set("*?["), path.parts))
    return path.is_absolute() and len(fixed) > 1 and Path(*fixed).exists()
