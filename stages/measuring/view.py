"""What a measure sees when it is its turn: samples, held-out data, and what networks made of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from stages.measuring.painters import Painter, painter_of
from stages.measuring.rows import HELD_OUT
from stages.measuring.samples import Asked, Need, Samples
from stages.runner.contract import Job
from stages.shards.tables import read_table

# (samples, network) -> the stored files in order; samples is "held-out" for the data, network is "" for what was drawn.
Stored = Mapping[tuple[str, str], Sequence[str]]


def named(samples: Samples | None) -> str:
    return samples.name if samples is not None else HELD_OUT


class View:
    """Reads what earlier units have stored.

    Attributes:
        asked: the evaluation.
    """

    def __init__(self, job: Job, asked: Asked, stored: Stored) -> None:
        self.job, self.asked, self.stored = job, asked, stored

    @cached_property
    def painter(self) -> Painter:
        """The checkpoint itself, for a measure that must draw more than it could say before."""
        return painter_of(self.job)(self.job)

    def images(self, samples: Samples | None, count: int) -> list[Any]:
        """The first pictures, PIL; of None the held-out ones, as people see them."""
        if samples is None:
            return self.painter.held_out.images(0, count)
        from unidiffuser.images import open_picture

        return [open_picture(value) for value in self._column(samples, "image", count)]

    def captions(self, samples: Samples | None, count: int) -> list[str]:
        if samples is None:
            return self.painter.held_out.captions(0, count)
        return list(self._column(samples, "caption", count))

    def references(self, count: int) -> list[list[str]]:
        """All that people have written of each held-out picture."""
        return self.painter.held_out.references(0, count)

    def features(self, need: Need) -> np.ndarray:
        """(count, D) fp32 of a need that names a network."""
        parts, rows = [], 0
        for path in self.stored[named(need.samples), str(need.network)]:
            if rows >= need.count:
                break
            column = read_table(self.job, path)["features"].combine_chunks()
            parts.append(np.frombuffer(b"".join(column.to_pylist()), np.float32).reshape(len(column), -1))
            rows += len(column)
        return np.concatenate(parts)[: need.count]

    def _column(self, samples: Samples, column: str, count: int) -> Iterator[Any]:
        left = count
        for path in self.stored[samples.name, ""]:
            if left <= 0:
                return
            values = read_table(self.job, path, columns=[column])[column].to_pylist()[:left]
            left -= len(values)
            yield from values
