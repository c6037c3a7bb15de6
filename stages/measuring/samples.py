"""What a measure asks for: samples of a task, and what a network makes of them or of the held-out data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from stages.runner.contract import digest_of

Task = Literal["t2i", "i2t", "joint", "i", "t"]
Network = Literal["inception", "clip-image", "clip-text", "scenes-shown", "scenes-said"]
SamplerName = Literal["dpm++2m", "dpm++3m", "unipc", "ddim", "dpm++2m-sde", "era", "analytic-dpm"]
SAYS = ("i2t", "joint", "t")


@dataclass(frozen=True)
class Samples:
    """Samples of a task, drawn in one way. Measures that ask for equal ones share them.

    The n-th is drawn with the evaluation's seed + n; of t2i for the n-th held-out caption, of i2t for the n-th held-out picture.

    Attributes:
        condition_t: noise on the condition, 0 to 1000.
        of: whose: the checkpoint's, those of a network of the same size that has learned nothing, or of the weights that training
            began from.
        damage: what has happened to the condition, a name of `stages.measuring.damage`; nothing if empty.
    """

    task: Task
    steps: int
    guidance: float
    sampler: str
    beams: int = 1
    condition_t: int = 0
    of: Literal["checkpoint", "untrained", "before"] = "checkpoint"
    damage: str = ""

    @property
    def name(self) -> str:
        """``t2i-untrained-3f9a2c1d``: readable, and another for samples that differ."""
        return f"{self.task}{'' if self.of == 'checkpoint' else f'-{self.of}'}-{digest_of(asdict(self))[:8]}"


@dataclass(frozen=True)
class Need:
    """What a measure reads when it is its turn: the first `count` samples, or of None the first of the held-out data.

    With a `network` it reads the features that this makes of them, else the pictures and captions themselves.
    """

    samples: Samples | None
    count: int
    network: Network | None = None


@dataclass(frozen=True)
class Asked:
    """The evaluation that a measure is part of, as it says what it needs.

    Attributes:
        count: held-out captions, and as many held-out pictures where there are `pictures`.
        before: whether the weights that training began from are named.
        way: samples in the evaluation's own way; `dataclasses.replace` makes others of what `samples` gives.
    """

    count: int
    pictures: bool
    way: Samples
    before: bool = False

    def samples(self, task: Task, of: Literal["checkpoint", "untrained", "before"] = "checkpoint") -> Samples:
        """Samples of a task in the evaluation's own way; the number of beams is of captions alone."""
        return replace(self.way, task=task, beams=self.way.beams if task in SAYS else 1, of=of)
