"""What a training run is: every number that decides its result, and the few that only decide where and how fast it runs.

A field whose schema carries `operational: true` cannot change the result beyond rounding, so a fingerprint may leave it out.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from training.where import Comparison

OPERATIONAL: dict[str, Any] = {"operational": True}

LARGEST_DEFAULT_LANES = 16


class Section(BaseModel):
    """Base of the sections below: an unknown field is an error, and a config that was checked does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Size of the U-ViT. The shapes of the parts come from the latent shards."""

    width: int = Field(1536, ge=8, description="Width of the tokens; the paper's is 1536.")
    depth: int = Field(30, ge=2, description="Number of in and out blocks, even; a middle block comes on top.")
    heads: int = Field(24, ge=1, description="Attention heads; they divide the width.")
    patch: int = Field(2, ge=1, description="Side of an image token in latent pixels.")
    position_std: float = Field(
        0.02,
        gt=0,
        le=10,
        description="Scale of the position table at the start; the paper's is 0.02, small models need 0.5.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Compute activations again in the backward pass to save memory.",
        json_schema_extra=OPERATIONAL,
    )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.depth % 2:
            raise ValueError(f"depth is {self.depth}; it must be even (as many in blocks as out blocks)")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class PartWeights(Section):
    """Weight of each part's mean squared error in the loss; they are divided by their sum."""

    latent: float = Field(0.75, ge=0, allow_inf_nan=False, description="Image latent.")
    clip: float = Field(0.02, ge=0, allow_inf_nan=False, description="CLIP image embedding.")
    text: float = Field(0.23, ge=0, allow_inf_nan=False, description="Text latent.")

    @model_validator(mode="after")
    def _check(self) -> PartWeights:
        if self.latent + self.clip + self.text <= 0:
            raise ValueError("all part weights are 0; give at least one part a weight")
        return self


class ObjectiveConfig(Section):
    """Weights inside the joint noise-prediction loss (UniDiffuser, equation 5)."""

    part_weights: PartWeights = Field(
        default_factory=PartWeights,
        description="Weights of the parts; the defaults are the shares of a flat mean over elements at 512 px.",
    )
    min_snr_gamma: float | None = Field(
        None,
        gt=0,
        description="Weigh timesteps by min(SNR, gamma) / SNR (arXiv 2303.09556); the paper's recipe has none.",
    )


class OptimizerConfig(Section):
    """AdamW, with the values of U-ViT."""

    lr: float = Field(2e-4, gt=0, le=1, description="Learning rate after the warm-up.")
    weight_decay: float = Field(0.03, ge=0, le=1, description="Decoupled weight decay.")
    betas: tuple[float, float] = Field((0.9, 0.9), description="Decay of the first and second moment.")

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; both must be in [0, 1)")
        return betas


class ScheduleConfig(Section):
    """Learning rate over the steps: linear warm-up, then constant or half a cosine."""

    warmup_steps: int = Field(5000, ge=0, description="Steps over which the learning rate rises linearly from 0.")
    decay: Literal["none", "cosine"] = Field("none", description="What follows the warm-up.")
    decay_steps: int | None = Field(
        None, ge=1, description="Step at which a cosine ends. A field of its own, so that a longer run keeps its past."
    )
    final_fraction: float = Field(0.0, ge=0, le=1, description="Part of the learning rate left after a cosine.")

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.decay == "cosine" and (self.decay_steps is None or self.decay_steps <= self.warmup_steps):
            raise ValueError(f"decay cosine needs decay_steps greater than warmup_steps ({self.warmup_steps})")
        return self


class EmaConfig(Section):
    """Exponential moving average of the weights, which sampling uses."""

    decay: float = Field(0.9999, ge=0, lt=1, description="Decay once warmed up; U-ViT's is 0.9999.")
    warmup: bool = Field(
        True,
        description="Use min(decay, (1 + n) / (10 + n)) at the n-th update, so that short runs forget their start.",
    )


class DataConfig(Section):
    """Which rows of the latent shards are read, and in which order."""

    where: tuple[str, ...] = Field(
        (),
        description='Conditions that a row must meet, for example "AESTHETIC_SCORE >= 5", on scores and sizes by their names '
        "here or in LAION's sets; a null score meets none.",
    )
    shuffle_window: int = Field(
        32,
        ge=1,
        le=4096,
        description="Row groups whose rows are mixed at a time, over all lanes, and about as many are in memory, over all "
        "workers; the row groups are permuted too.",
    )
    lanes: int | None = Field(
        None,
        ge=1,
        description="Parallel readers of which a global batch takes equal parts; a multiple of the workers reads "
        "least. Default: the greatest divisor of the global batch up to 16.",
    )

    @field_validator("where")
    @classmethod
    def _check_where(cls, where: tuple[str, ...]) -> tuple[str, ...]:
        for text in where:
            if Comparison.parse(text).of_text:
                raise ValueError(f"{text!r}: latent shards have numbers to compare; write COLUMN OP NUMBER")
        return where


class ValidationConfig(Section):
    """The held-out rows, chosen by the hash of their key, and how often the loss on them is measured."""

    fraction: float = Field(0.02, ge=0, le=0.5, description="Part of the rows that training never sees.")
    every: int = Field(1000, ge=1, description="Steps between two validations.", json_schema_extra=OPERATIONAL)
    samples: int = Field(256, ge=1, description="Rows that a validation looks at, at most.", json_schema_extra=OPERATIONAL)


class TrainConfig(Section):
    """One training stage, the paper's values as defaults (arXiv 2303.06555, section 6.1 and U-ViT)."""

    steps: int = Field(ge=1, description="Optimizer steps in all. A longer run goes on from a shorter one's checkpoint.")
    global_batch: int = Field(ge=1, description="Samples an optimizer step, over all workers.")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "auto", description="Arithmetic; auto is bf16 where the accelerator has it and fp32 elsewhere."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Decides start weights, order, timesteps and noise.")
    gradient_clip: float = Field(0.0, ge=0, description="Greatest norm of the gradient; 0 for no clipping.")

    model: ModelConfig = Field(default_factory=ModelConfig, description="Size of the network.")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="Weights inside the loss.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="Learning rate over the steps.")
    ema: EmaConfig = Field(default_factory=EmaConfig, description="Moving average of the weights.")
    data: DataConfig = Field(default_factory=DataConfig, description="Rows and order; a recipe writes the subsets here too.")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="Held-out loss.")

    workers: int = Field(1, ge=1, description="Processes, one a GPU or a group of CPU cores.", json_schema_extra=OPERATIONAL)
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="Samples a worker computes at once; gradients are accumulated to the global batch. Default: all.",
        json_schema_extra=OPERATIONAL,
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO: what is sharded. 0 (nothing) is for fp32.", json_schema_extra=OPERATIONAL
    )
    compile: bool = Field(False, description="torch.compile, where a C++ compiler is found.", json_schema_extra=OPERATIONAL)
    checkpoint_every: int = Field(1000, ge=1, description="Steps between two checkpoints.", json_schema_extra=OPERATIONAL)
    log_every: int = Field(50, ge=1, description="Steps that one row of the history averages.", json_schema_extra=OPERATIONAL)
    keep_every: int | None = Field(
        None,
        ge=1,
        description="Keep the checkpoints whose step is a multiple of this; others give way to the next one.",
        json_schema_extra=OPERATIONAL,
    )

    @property
    def lanes(self) -> int:
        """Number of parallel readers: the field, or the greatest divisor of the global batch up to 16."""
        if self.data.lanes is not None:
            return self.data.lanes
        return max(n for n in range(1, LARGEST_DEFAULT_LANES + 1) if self.global_batch % n == 0)

    @property
    def worker_batch(self) -> int:
        """Samples of one optimizer step that fall to one worker."""
        return self.global_batch // self.workers

    @property
    def worker_micro_batch(self) -> int:
        """Samples that a worker computes at once."""
        return self.micro_batch or self.worker_batch

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.global_batch % self.workers:
            raise ValueError(f"global_batch {self.global_batch} is not divisible by workers {self.workers}")
        if self.worker_batch % self.worker_micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide the {self.worker_batch} samples of a worker "
                f"(global_batch {self.global_batch} / workers {self.workers})"
            )
        if self.data.lanes is not None and self.global_batch % self.data.lanes:
            raise ValueError(f"global_batch {self.global_batch} is not divisible by data.lanes {self.data.lanes}")
        return self
