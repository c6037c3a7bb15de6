"""A measure: a component that owns its configuration, says what samples it needs, and makes figures of them.

A new measure is a module with a subclass of `Measure`, named in `stages.measuring.measures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from stages.measuring.samples import Asked, Need
from stages.runner.contract import StageConfig

if TYPE_CHECKING:
    from stages.measuring.view import View
    from stages.runner.contract import Output

# Digits that are kept behind the point: more would be rounding of the machine.
DIGITS = 6


@dataclass(frozen=True)
class Figure:
    """One number of a report.

    Attributes:
        name: in lower case with underscores, with what its features are of unless these are the usual ones: `fid` is over
            Inception's and `fid_clip` over CLIP's, so that nobody compares one with the other.
        better: where good is; None where neither end is.
        samples: how many samples it is of.
        by: the network behind it, as the recipe names it.
        note: what is to be said beside it, such as that there are too few samples.
    """

    name: str
    value: float
    better: Literal["lower", "higher"] | None
    samples: int
    by: str = ""
    note: str = ""


@dataclass(frozen=True)
class Result:
    """What a measure found: figures, and any JSON besides, which the report has below `details`."""

    figures: Sequence[Figure]
    details: Mapping[str, Any] = field(default_factory=dict)


class Measure(StageConfig):
    """Base of the measures; a subclass has a field `kind`, by which recipes name it."""

    kind: str

    @property
    def of_world(self) -> bool:
        """Whether it knows no pictures but those of the world of shapes."""
        return False

    def needs(self, asked: Asked) -> list[Need]:
        """What it reads.

        Raises:
            StageError: it needs held-out pictures, and there are none.
        """
        raise NotImplementedError

    def result(self, view: View, out: Output) -> Result:
        """Its figures; files that it writes to `out` are part of the dataset."""
        raise NotImplementedError

    def networks(self, asked: Asked) -> set[str]:
        return {need.network for need in self.needs(asked) if need.network is not None}
