"""Conditions on any column of a metadata file, by its own name, in the words of a training stage's `where`.

    similarity >= 0.3        LICENSE != ?        NSFW in [UNLIKELY, UNSURE]        status not in [404, 410]

A condition on numbers reads the column as numbers, one on text as text. Rows that fail count as ``where_COLUMN``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.shards.conditions import Condition

COMPARISON = re.compile(r"^\s*(.+?)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*$")
MEMBERSHIP = re.compile(r"^\s*(.+?)\s+(not in|in)\s+\[(.+)\]\s*$")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
COMPARE = {
    ">=": pc.greater_equal, "<=": pc.less_equal, ">": pc.greater, "<": pc.less, "==": pc.equal, "!=": pc.not_equal,
}  # fmt: skip


@dataclass(frozen=True)
class Where:
    """`column` is the file's own name; `values` are all numbers or all text, one unless the operator is (not) in."""

    column: str
    operator: str
    values: tuple[float | str, ...]

    @classmethod
    def parse(cls, text: str) -> Where:
        """Raises ValueError that shows the form when the text has another one."""
        if match := MEMBERSHIP.match(text):
            values = [_number_or_text(value.strip()) for value in match[3].split(",")]
        elif match := COMPARISON.match(text):
            values = [_number_or_text(match[3])]
        else:
            raise ValueError(f'"{text}" is no condition; write COLUMN OP VALUE or COLUMN in [VALUE, ...]')
        if len({type(value) for value in values}) != 1:
            raise ValueError(f'"{text}": expected numbers or text, not both, and at least one value')
        if isinstance(values[0], str) and match[2] in ("<", "<=", ">", ">="):
            raise ValueError(f'"{text}": {match[2]} compares numbers; text can be ==, !=, in or not in')
        return cls(match[1], match[2], tuple(values))

    @property
    def label(self) -> str:
        """The column's name in a table of rows, and the reason in the counts."""
        return f"where_{self.column}"

    @property
    def type(self) -> pa.DataType:
        return pa.string() if isinstance(self.values[0], str) else pa.float64()

    def condition(self) -> Condition:
        return Condition(self.label, (self.label,), self._test)

    def _test(self, table: pa.Table) -> Any:
        column = table[self.label]
        if self.operator in COMPARE:
            return COMPARE[self.operator](column, pa.scalar(self.values[0], self.type))
        member = pc.is_in(column, value_set=pa.array(self.values, self.type))
        # is_in calls null a miss; a row without a value must stay unknown.
        return pc.if_else(pc.is_valid(column), member if self.operator == "in" else pc.invert(member), None)


def _number_or_text(written: str) -> float | str:
    return float(written) if NUMBER.match(written) else written.strip("\"'")
