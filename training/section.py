"""The base of every section of a training's configuration, and the mark of a field that cannot change the result."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

# A field whose schema carries this cannot change the result beyond rounding, so a fingerprint may leave it out.
OPERATIONAL: dict[str, Any] = {"operational": True}


class Section(BaseModel):
    """An unknown field is an error, and a config that was checked does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
