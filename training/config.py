"""What a training run is: every number that decides its result, and the few that only decide where and how fast it runs.

See `training.section` for fields that cannot change the result.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from training.averaging import EmaConfig
from training.optimizers.adamw import AdamW
from training.optimizers.choice import OptimizerConfig
from training.rates import ScheduleConfig
from training.section import OPERATIONAL, Section
from training.where import Comparison
from unidiffuser.noise import NoiseConfig

LARGEST_DEFAULT_LANES = 16


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
    position_side: int | None = Field(
        None,
        ge=1,
        description="Side, in latent pixels, of the images that the position table is made for, where that is not the latents' "
        "own: 64 for the published tables, which are interpolated as latents of another size pass through.",
    )
    data_type_token: bool = Field(
        False, description="A token that tells two types of data apart, as in the published version 1; see data.data_type."
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
        if self.position_side is not None and self.position_side % self.patch:
            raise ValueError(f"position_side {self.position_side} is not divisible by patch {self.patch}")
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


class LoraConfig(Section):
    """Adapters of low rank that are trained instead of the weights (arXiv 2106.09685)."""

    rank: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: int = Field(16, ge=1, description="The adapters count alpha / rank times.")
    targets: tuple[Literal["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "skip_linear"], ...] = Field(
        ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), min_length=1, description="Linear layers of the blocks that get one."
    )


class DataConfig(Section):
    """Which rows of the latent shards are read, and in which order."""

    where: tuple[str, ...] = Field(
        (),
        description='Conditions that a row must meet, for example "AESTHETIC_SCORE >= 5", on scores and sizes by their names '
        "here or in LAION's sets; a null score meets none.",
    )
    data_type: Literal[0, 1] | str | None = Field(
        None,
        description="For a model with model.data_type_token, the type of the rows: 0 or 1 for all, or a condition like those of "
        "`where`, which rows of type 1 meet. In the published version 1, type 0 is web data and type 1 cleaner pairs.",
    )
    order: Literal["shuffled", "written"] = Field(
        "shuffled",
        description="How the rows of an epoch are ordered: permuted, or as they were written, for rows whose order was made with "
        "care. With data.lanes 1 and validation.fraction 0, the n-th row is then the n-th to be read.",
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

    @field_validator("where", "data_type")
    @classmethod
    def _check_conditions(cls, given: Any) -> Any:
        for text in given if isinstance(given, tuple) else (given,):
            if isinstance(text, str) and Comparison.parse(text).of_text:
                raise ValueError(f"{text!r}: latent shards have numbers to compare; write COLUMN OP NUMBER")
        return given

    @property
    def conditions(self) -> tuple[Comparison, ...]:
        """Those of `where`, and that of the data type behind them if there is one."""
        texts = (*self.where, *((self.data_type,) if isinstance(self.data_type, str) else ()))
        return tuple(map(Comparison.parse, texts))


class ValidationConfig(Section):
    """The held-out rows, chosen by the hash of their key, and how often the loss on them is measured."""

    fraction: float = Field(0.02, ge=0, le=0.5, description="Part of the rows that training never sees.")
    every: int = Field(1000, ge=1, description="Steps between two validations.", json_schema_extra=OPERATIONAL)
    samples: int = Field(256, ge=1, description="Rows that a validation looks at, at most.", json_schema_extra=OPERATIONAL)


class TrainConfig(Section):
    """One training stage, the paper's values as defaults (arXiv 2303.06555, section 6.1 and U-ViT)."""

    steps: int = Field(
        ge=0,
        description="Optimizer steps in all. A longer run goes on from a shorter one's checkpoint; 0 keeps what it starts from.",
    )
    global_batch: int = Field(ge=1, description="Samples an optimizer step, over all workers.")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "auto", description="Arithmetic; auto is bf16 where the accelerator has it and fp32 elsewhere."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Decides start weights, order, timesteps and noise.")
    gradient_clip: float = Field(0.0, ge=0, description="Greatest norm of the gradient; 0 for no clipping.")

    model: ModelConfig = Field(default_factory=ModelConfig, description="Size of the network.")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="Weights inside the loss.")
    noise: NoiseConfig = Field(default_factory=NoiseConfig, description="Noise schedule; a checkpoint carries it to sampling.")
    timesteps: Literal["uniform", "sobol"] = Field(
        "uniform",
        description="How a sample's timesteps are drawn: independently, as in the paper, or as the next point of a scrambled "
        "Sobol sequence, of which every stretch has close to its share of each combination.",
    )
    optimizer: OptimizerConfig = Field(default_factory=AdamW, description="AdamW or Muon, by its kind.")
    lora: LoraConfig | None = Field(
        None, description="Train adapters of low rank on the weights that the run starts from, and nothing else; needs peft."
    )
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
        if self.model.data_type_token and self.data.data_type is None:
            raise ValueError("model.data_type_token needs data.data_type: 0, 1, or a condition that the rows of type 1 meet")
        if not self.model.data_type_token and self.data.data_type is not None:
            raise ValueError(f"data.data_type is {self.data.data_type!r}, which only model.data_type_token: true reads")
        if self.data.lanes is not None and self.global_batch % self.data.lanes:
            raise ValueError(f"global_batch {self.global_batch} is not divisible by data.lanes {self.data.lanes}")
        if self.lora is not None and self.optimizer.kind == "muon":
            raise ValueError("optimizer.kind muon is for the matrices of the blocks, which lora freezes; use adamw")
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError("zero_stage 0 keeps no fp32 master weights for bf16; use zero_stage 1, or precision fp32")
        if self.schedule.decay == "plateau" and self.validation.fraction == 0:
            raise ValueError("schedule.decay plateau looks at held-out rows; give validation.fraction a value above 0")
        return self
