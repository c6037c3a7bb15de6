"""Conditions on any column of a metadata file, by its own name. Rows that fail count as ``where_COLUMN``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stages.shards.conditions import Condition
from training.where import Comparison


@dataclass(frozen=True)
class Where(Comparison):
    """A condition whose column is read beside the canonical ones, under a label of its own."""

    @property
    def label(self) -> str:
        """The column's name in a table of rows, and the reason in the counts."""
        return f"where_{self.column}"

    @property
    def type(self) -> pa.DataType:
        return pa.string() if self.of_text else pa.float64()

    def condition(self) -> Condition:
        return Condition(self.label, (self.label,), self._test)

    def _test(self, table: pa.Table) -> Any:
        return self.passes(table[self.label])
