"""Further captions of a row, beside its own: `caption.NAME` in its metadata and among a dataset's columns; null is none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import pyarrow as pa
from pydantic import AfterValidator, Field

from stages.shards.tar import Sample

PREFIX = "caption."


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is there twice; name each caption once")
    return names


# Of a configuration that says which further captions there are.
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AfterValidator(_distinct)]


def column_of_caption(name: str) -> str:
    """Where the caption of a name stands."""
    return f"{PREFIX}{name}"


def names_of(columns: Iterable[str]) -> list[str]:
    """The further captions among the columns of a dataset, in the order of the alphabet."""
    return sorted(column.removeprefix(PREFIX) for column in columns if column.startswith(PREFIX))


def schema_of(names: Sequence[str]) -> dict[str, str]:
    """Type of the columns of these captions, by name."""
    return {column_of_caption(name): "string" for name in names}


def columns_read(names: Sequence[str]) -> dict[str, tuple[str, pa.DataType]]:
    """Where outside metadata has these captions: the file's own column and its type, by the column here."""
    return {column_of_caption(name): (name, pa.string()) for name in names}


def caption_of(sample: Sample, name: str) -> str | None:
    """A sample's further caption of a name; None where there is none."""
    return (sample.meta.get(column_of_caption(name)) or "").strip() or None
