"""The world of shapes as held-out data: captions and pictures that training never saw, as many as are asked for."""

from __future__ import annotations

from functools import cached_property
from typing import Any


class WorldPrompts:
    """Captions and pictures of the world, by number and seed; see `stages.measuring.prompts.Prompts`."""

    pictures = True

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    @cached_property
    def _asked(self) -> Any:
        from examples.shapes.measure import Protocol, asked

        return asked(Protocol(conditional=self.count, seed=self.seed))

    def digests(self, start: int, stop: int) -> tuple[str, ...]:
        return (f"world {self.seed} {self.count}",)

    def captions(self, start: int, stop: int) -> list[str]:
        return list(self._asked[1][start:stop])

    def references(self, start: int, stop: int) -> list[list[str]]:
        return [[caption] for caption in self.captions(start, stop)]

    def images(self, start: int, stop: int) -> list[Any]:
        from PIL import Image

        return [Image.fromarray(picture) for picture in self._asked[2][start:stop]]
