"""Conditions on rows, the same words in select (on what the metadata says) and in filter (on what was measured).

A configuration sets a condition by a field ``min_QUANTITY`` or ``max_QUANTITY``; bounds are inclusive. A row whose value is null
meets a condition on it when `keep_null` is true (LAION's scores are null where an outer join found nothing, which says
nothing about the image), and is counted as ``null_COLUMN`` otherwise. One whose value is there but cannot be read, such as a
width of "wide", meets no condition on it: it is counted as ``bad_COLUMN``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.shards.scores import SCORES
from stages.shards.words import count_words


def unreadable(column: str) -> str:
    """The reason of rows whose value of a column cannot be read, and the name of a mask of them in a table."""
    return f"bad_{column}"


@dataclass(frozen=True)
class Condition:
    """`test` gives true, false or null (unknown) a row; rows that fail are counted under `name`."""

    name: str
    columns: tuple[str, ...]
    test: Callable[[pa.Table], Any]


@dataclass
class Verdict:
    """What is left of a table's rows, and why the others went: `passing` is a mask of shape (rows,)."""

    passing: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, failing: Any, unknown: bool = False) -> None:
        """Drop the rows of a mask that are not dropped yet; `unknown` says what null means in it."""
        mask = np.asarray(pc.fill_null(failing, unknown)) if isinstance(failing, pa.Array | pa.ChunkedArray) else failing
        lost = self.passing & mask.astype(bool)
        if count := int(lost.sum()):
            self.dropped[reason] = self.dropped.get(reason, 0) + count
            self.passing[lost] = False

    def judge(self, table: pa.Table, conditions: list[Condition], keep_null: bool) -> None:
        """Try the conditions in their order; the first one that a row fails counts."""
        for condition in conditions:
            for column in condition.columns:
                if unreadable(column) in table.column_names:
                    self.drop(unreadable(column), table[unreadable(column)])
            if not keep_null:
                for column in condition.columns:
                    self.drop(f"null_{column}", pc.is_null(table[column]))
            self.drop(condition.name, pc.invert(condition.test(table)))


def conditions(config: Any) -> list[Condition]:
    """The conditions that a configuration sets, in the order of `QUANTITIES`, `languages` last."""
    found = []
    for quantity, (columns, lowest, highest) in QUANTITIES.items():
        # Scores are stored as float32: compared as such, a stored 0.3 meets a bound of 0.3.
        kind = pa.float32() if quantity in SCORES else pa.float64()
        if (bound := getattr(config, f"min_{quantity}", None)) is not None:
            found.append(Condition(f"min_{quantity}", columns, _compare(pc.greater_equal, lowest, pa.scalar(float(bound), kind))))
        if (bound := getattr(config, f"max_{quantity}", None)) is not None:
            found.append(Condition(f"max_{quantity}", columns, _compare(pc.less_equal, highest, pa.scalar(float(bound), kind))))
    if getattr(config, "languages", None) is not None:
        found.append(Condition("language", ("language",), _language(pa.array(config.languages))))
    return found


def columns_of(found: list[Condition]) -> set[str]:
    return {column for condition in found for column in condition.columns}


Measure = Callable[[pa.Table], Any]


def _compare(compare: Any, measure: Measure, bound: pa.Scalar) -> Measure:
    return lambda table: compare(measure(table), bound)


def _language(codes: pa.Array) -> Measure:
    # is_in calls null a miss; a row without a language must stay unknown.
    return lambda table: pc.if_else(pc.is_valid(table["language"]), pc.is_in(table["language"], value_set=codes), None)


def _column(name: str) -> Measure:
    return lambda table: table[name]


def _shorter(table: pa.Table) -> Any:
    return pc.min_element_wise(table["width"], table["height"], skip_nulls=False)


def _longer(table: pa.Table) -> Any:
    return pc.max_element_wise(table["width"], table["height"], skip_nulls=False)


def _aspect_ratio(table: pa.Table) -> Any:
    return pc.divide(_longer(table).cast(pa.float64()), _shorter(table).cast(pa.float64()))


def _chars(table: pa.Table) -> Any:
    return pc.utf8_length(table["caption"])


def _words(table: pa.Table) -> Any:
    return count_words(table["caption"])


# Quantity -> (columns that may be null, what `min_` is compared with, what `max_` is compared with), in the order of trial.
QUANTITIES: dict[str, tuple[tuple[str, ...], Measure, Measure]] = {
    "width": (("width",), _column("width"), _column("width")),
    "height": (("height",), _column("height"), _column("height")),
    "side": (("width", "height"), _shorter, _longer),
    "aspect_ratio": (("width", "height"), _aspect_ratio, _aspect_ratio),
    "caption_chars": ((), _chars, _chars),
    "caption_words": ((), _words, _words),
    **{score: ((score,), _column(score), _column(score)) for score in SCORES},
}
