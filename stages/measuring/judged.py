"""The little web of the demo by its judge: whether pictures and captions are of the scene that they were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.measuring.measure import Figure, Measure, Result
from stages.measuring.samples import Asked, Need
from stages.runner.contract import StageError

if TYPE_CHECKING:
    from stages.measuring.view import View
    from stages.runner.contract import Output

NAME = "the little web's judge"


class Judge(Measure):
    """Shares of samples in which drawing, background, place and size are right, and all four of them.

    Of pictures that were drawn for captions, and of those that the weights draw that training began from; of captions that were
    written for pictures; and of the real pictures, for which the judge itself is to blame.
    """

    kind: Literal["judge"] = Field("judge", description="for captions of the demo's little web: are all parts of a scene right?")
    count: int | None = Field(None, ge=2, description="samples; as many as the evaluation has captions when not given")
    before: int = Field(100, ge=2, description="samples of the weights that training began from, where `before` names them")

    def parts(self, asked: Asked) -> dict[str, Need]:
        """Name of the figures -> what is judged."""
        count = min(self.count or asked.count, asked.count)
        found = {"t2i": Need(asked.samples("t2i"), count)}
        if asked.before:
            found["t2i_before"] = Need(asked.samples("t2i", of="before"), min(self.before, count))
        if asked.pictures:
            found |= {"i2t": Need(asked.samples("i2t"), count), "real": Need(None, count)}
        return found

    def needs(self, asked: Asked) -> list[Need]:
        return list(self.parts(asked).values())

    def result(self, view: View, out: Output) -> Result:
        from examples.little_web.judge import Judge as Network
        from examples.little_web.judge import agreement

        judge, parts = Network.load(), self.parts(view.asked)
        wanted = scenes_of(view.captions(None, parts["t2i"].count))
        figures, details = [], {}
        for name, need in parts.items():
            if name == "i2t":
                shown = scenes_of(view.captions(need.samples, need.count), strict=False)
            else:
                shown = judge.read(view.images(need.samples, need.count))
            details[name] = agreement(shown, wanted[: need.count])
            better: Literal["higher"] | None = "higher" if name in ("t2i", "i2t") else None
            figures.append(Figure(f"judge_{name}_all_four", details[name]["all_four"], better, need.count, NAME))
        return Result(figures, details)


def scenes_of(captions: Sequence[str], strict: bool = True) -> list[Any]:
    """The scenes that captions say; None for one that says none, where that is no mistake.

    Raises:
        StageError: with `strict`, one says none.
    """
    from examples.little_web.compose import scene_of

    found = [scene_of(caption) for caption in captions]
    if strict and None in found:
        other = captions[found.index(None)]
        raise StageError(f"measures: judge knows the captions of the demo's little web alone, and not {other!r}; leave it out")
    return found
