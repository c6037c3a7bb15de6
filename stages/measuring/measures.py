"""All measures, by the `kind` that recipes name them by."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stages.measuring.captions import Captions
from stages.measuring.judged import Judge
from stages.measuring.matching import ClipScore, Preference
from stages.measuring.pictures import Cmmd, Fid, Kid, PrecisionRecall
from stages.measuring.robustness import Robustness
from stages.measuring.scenes import Shapes
from stages.measuring.sweeps import Guidance, Samplers

AnyMeasure = Annotated[
    Fid | Kid | Cmmd | PrecisionRecall | ClipScore | Captions | Preference | Judge | Shapes | Guidance | Samplers | Robustness,
    Field(discriminator="kind"),
]
