"""The noise schedule as a configuration: with Stable Diffusion's values, which the published weights were trained with."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class NoiseConfig(BaseModel):
    """The betas of `unidiffuser.schedule.NoiseSchedule`, of 1000 timesteps."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    beta_start: float = Field(0.00085, gt=0, lt=1, description="First beta; the roots rise in equal steps to that of the last.")
    beta_end: float = Field(
        0.012,
        gt=0,
        lt=1,
        description="Last beta. Stable Diffusion's two leave 7% of the data at the last timestep, enough to spoil marginals; "
        "0.005 and 0.02 leave 0.3%.",
    )

    @model_validator(mode="after")
    def _rises(self) -> NoiseConfig:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}; noise grows with the timestep")
        return self
