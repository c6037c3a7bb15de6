"""Conditions on columns as a recipe writes them, for the metadata of a select and for the latents of a training stage alike.

    similarity >= 0.3        LICENSE != ?        NSFW in [UNLIKELY, UNSURE]        LICENSE == "Public domain, US"

What stands in quotes, double or single, is text as it is, a number and a comma too; a backslash keeps a quote or a backslash in
it. A column's name can stand in quotes likewise. What stands without quotes is a number if it looks like one, and text otherwise.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

QUOTED = r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\''
PLAIN = r"""[^\s"'](?:.*?[^\s"'])??"""
CONDITION = re.compile(
    rf"\s*(?P<column>{QUOTED}|{PLAIN})"
    r"(?:\s*(?P<compares>>=|<=|==|!=|>|<)(?P<value>.*)|\s+(?P<member>not in|in)\s+\[(?P<list>.*)\]\s*)",
    re.DOTALL,
)
VALUE = re.compile(rf"\s*(?:(?P<quoted>{QUOTED})|(?P<plain>{PLAIN}))\s*", re.DOTALL)
ITEM = re.compile(rf"""\s*({QUOTED}|[^\s"',[\]](?:[^,[\]]*[^\s"',[\]])?)\s*(?:,|$)""")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
COMPARE = {
    ">=": pc.greater_equal, "<=": pc.less_equal, ">": pc.greater, "<": pc.less, "==": pc.equal, "!=": pc.not_equal,
}  # fmt: skip
Self = TypeVar("Self", bound="Comparison")


@dataclass(frozen=True)
class Comparison:
    """`column` is the file's own name; `values` are all numbers or all text, one unless the operator is (not) in."""

    column: str
    operator: str
    values: tuple[float | str, ...]

    @classmethod
    def parse(cls: type[Self], text: str) -> Self:
        """Raises ValueError that shows the form when the text has another one."""
        match = CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no condition; write COLUMN OP VALUE or COLUMN in [VALUE, ...]")
        operator = match["compares"] or match["member"]
        written = [match["value"].strip()] if match["compares"] else _items(match["list"], text)
        values = tuple(_number_or_text(value, text) for value in written)
        if len({type(value) for value in values}) != 1:
            raise ValueError(f"{text!r}: expected numbers or text, not both, and at least one value")
        if isinstance(values[0], str) and operator in ("<", "<=", ">", ">="):
            raise ValueError(f"{text!r}: {operator} compares numbers; text can be ==, !=, in or not in")
        return cls(_bare(match["column"]), operator, values)

    @property
    def of_text(self) -> bool:
        return isinstance(self.values[0], str)

    def passes(self, column: pa.Array | pa.ChunkedArray) -> Any:
        """True, false or null (unknown) for every value of a column of text, or of numbers in which nothing is NaN.

        A number is compared in the precision in which the column has it: a score that was stored as 0.3 equals 0.3.
        """
        kind = pa.string() if self.of_text else column.type if pa.types.is_floating(column.type) else pa.float64()
        values = pa.array(self.values, pa.string() if self.of_text else pa.float64()).cast(kind)
        if self.operator in COMPARE:
            return COMPARE[self.operator](column, values[0])
        member = pc.is_in(column.cast(kind), value_set=values)
        # is_in calls null a miss; a row without a value must stay unknown.
        return pc.if_else(pc.is_valid(column), member if self.operator == "in" else pc.invert(member), None)


def _items(written: str, text: str) -> list[str]:
    """The values of a list, as they are written."""
    found: list[str] = []
    place = 0
    while place < len(written) or not found or written[place - 1] == ",":
        item = ITEM.match(written, place)
        if item is None:
            raise ValueError(
                f"{text!r}: {written[place:].strip()!r} is no list of values; one with a comma or a bracket needs quotes"
            )
        found.append(item[1])
        place = item.end()
    return found


def _number_or_text(written: str, text: str) -> float | str:
    if NUMBER.fullmatch(written):
        if math.isinf(number := float(written)):
            raise ValueError(f"{text!r}: {written} is too large a number; write a smaller one, or put quotes around text")
        return number
    # `== [A, B]` and `=== A` would be text that no row has, and drop all of them.
    if VALUE.fullmatch(written) is None or written[0] in "=[":
        raise ValueError(f"{text!r}: {written or 'nothing'} is no value; quotes come in pairs around the whole of it")
    # Text is read from a file without the white space around it.
    return _bare(written).strip()


def _bare(written: str) -> str:
    return re.sub(r"\\(.)", r"\1", written[1:-1]) if written[0] in "\"'" else written
