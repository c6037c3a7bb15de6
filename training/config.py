"""What a training run is: every number that decides its result, and the few that only decide where and how fast it runs.

See `training.section` for fields that cannot change the result.
"""

from __future__ import annotations

from collections.abc import Collection
from math import fsum
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from training.averaging import EmaConfig
from training.damage import DamageConfig
from training.mixture import reduced
from training.optimizers.adamw import AdamW
from training.optimizers.choice import OptimizerConfig
from training.profiling import ProfileConfig
from training.rates import ScheduleConfig
from training.section import OPERATIONAL, Section
from training.where import Comparison
from training.zero import ZeroConfig, refusal
from unidiffuser.noise import NoiseConfig

# Lanes by default: at least so many, where the global batch can be divided so, and of so many rows each.
LEAST_LANES, ROWS_OF_A_LANE = 16, 8


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
    activation_checkpointing: int = Field(
        0,
        ge=0,
        description="Keep no activations of every n-th block, and compute them again in the backward pass: 1 saves most memory, "
        "and costs a third more arithmetic; 2 half of both; 0 keeps all.",
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
        description="Row groups whose rows are mixed at a time, over all lanes, at least one a lane, and about as many are in "
        "memory, over all workers; the row groups are permuted too.",
    )
    lanes: int | None = Field(
        None,
        ge=1,
        description="Parallel readers of which a global batch takes equal parts; a multiple of the workers reads "
        "least. Default: the greatest divisor of the global batch up to an eighth of it, or up to shuffle_window, or up to 16, "
        "whichever is most. Of 8 * shuffle_window rows or more, that is a multiple of the workers wherever each has a multiple "
        "of eight, and it does not depend on them: any number reads in the same order. A mixture's subsets have their own.",
    )
    weights: dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="Shares of the subsets, by name, in whole numbers whose sum divides the global batch: each global batch has "
        "exactly its share of each. A subset that is smaller for its share is read more often. Default: every row is read once "
        "an epoch, whichever subset it is of.",
    )

    captions: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict,
        description="Probabilities of the further captions that rows have, by name, such as {synthetic: 0.5}; one is drawn each "
        "time that a row is read. What is left to 1 is the row's own caption, which also stands in where a row has none of that "
        "name. Names are those of `captions` of the subset's select or folder.",
    )

    @field_validator("captions")
    @classmethod
    def _at_most_1(cls, given: dict[str, float]) -> dict[str, float]:
        if (total := fsum(given.values())) > 1:
            raise ValueError(f"the probabilities sum to {total:.6g}; lower them to 1 at most: the row's own caption has the rest")
        return given

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
    """The held-out rows, chosen by the hash of their key, and how often the loss on them is measured, with the weights as trained
    and with their average."""

    fraction: float = Field(0.005, ge=0, le=0.5, description="Part of the rows that training never sees.")
    every: int = Field(1000, ge=1, description="Steps between two validations.", json_schema_extra=OPERATIONAL)
    samples: int = Field(
        256,
        ge=1,
        description="Rows that a validation looks at, at most, of every input and every shard alike.",
        json_schema_extra=OPERATIONAL,
    )


class KeepConfig(Section):
    """Which checkpoints stay."""

    last: int = Field(3, ge=1, description="The newest so many checkpoints stay.")
    every: int | None = Field(
        None, ge=1, description="Those whose step is a multiple of this stay as well; the others give way to newer ones."
    )

    def of(self, steps: Collection[int]) -> set[int]:
        """Those of these steps that stay."""
        return {step for step in steps if self.every is not None and step % self.every == 0} | set(sorted(steps)[-self.last :])


class WorkerRange(Section):
    """As many workers as the cluster has, between two numbers; of those, the numbers that divide the batch."""

    min: int = Field(ge=1, description="Fewest workers; with fewer the run waits.")
    max: int = Field(ge=1, description="Most workers.")

    @model_validator(mode="after")
    def _check(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


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

    workers: Annotated[int, Field(ge=1)] | WorkerRange = Field(
        1,
        description="Processes, one a GPU or a group of CPU cores. With {min, max} as many as the cluster has, also after it has "
        "lost or won a machine.",
        json_schema_extra=OPERATIONAL,
    )
    machines: str | None = Field(
        None,
        description="Custom resource of Ray whose machines do the work; any machine when not given.",
        json_schema_extra=OPERATIONAL,
    )
    silent_after: int = Field(
        60,
        ge=5,
        description="Seconds without a sign of life after which a worker is given up, and all are started again.",
        json_schema_extra=OPERATIONAL,
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="Samples a worker computes at once; gradients are accumulated to the global batch. Default: all; auto: as "
        "many as a GPU's memory holds by the estimate that refuses too much, and all on a CPU.",
        json_schema_extra=OPERATIONAL,
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO: what is sharded. 0 (nothing) is for fp32.", json_schema_extra=OPERATIONAL
    )
    zero: ZeroConfig = Field(default_factory=ZeroConfig, description="How ZeRO goes about it.", json_schema_extra=OPERATIONAL)
    compile: bool = Field(False, description="torch.compile, where a C++ compiler is found.", json_schema_extra=OPERATIONAL)
    checkpoint_every: int = Field(1000, ge=1, description="Steps between two checkpoints.", json_schema_extra=OPERATIONAL)
    log_every: int = Field(50, ge=1, description="Steps that one row of the history averages.", json_schema_extra=OPERATIONAL)
    keep: KeepConfig = Field(default_factory=KeepConfig, description="Which checkpoints stay.", json_schema_extra=OPERATIONAL)
    damage: DamageConfig = Field(default_factory=DamageConfig, description="What is done about damage.")
    profile: ProfileConfig | None = Field(
        None, description="Steps to trace with torch's profiler, into a file on the store.", json_schema_extra=OPERATIONAL
    )

    @property
    def shares(self) -> tuple[int, ...]:
        """Shares of the subsets in the least whole numbers, by their names' order; (1,) where they have none."""
        return reduced([weight for _, weight in sorted(self.data.weights.items())]) if self.data.weights else (1,)

    @property
    def batches(self) -> tuple[int, ...]:
        """Samples of each subset in a global batch."""
        return tuple(self.global_batch * share // sum(self.shares) for share in self.shares)

    @property
    def lanes(self) -> tuple[int, ...]:
        """Parallel readers of each subset."""
        return tuple(lanes for _, lanes in map(self.lanes_of, self.batches))

    def lanes_of(self, batch: int) -> tuple[int, int]:
        """Row groups of a window, and number of lanes, of a subset that has `batch` samples of a global batch."""
        window, lanes = self.data.shuffle_window * batch // self.global_batch, self.data.lanes
        if lanes is None:
            most = max(LEAST_LANES, window, batch // ROWS_OF_A_LANE)
            lanes = max(n for n in range(1, min(most, batch) + 1) if batch % n == 0)
        return max(1, window // lanes), lanes

    @property
    def fewest_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def most_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def allowed_workers(self) -> list[int]:
        """The numbers of workers between the two that get equal shares of the batch, in whole micro-batches."""
        share = self.micro_batch if isinstance(self.micro_batch, int) else 1
        return [n for n in range(self.fewest_workers, self.most_workers + 1) if self.global_batch % (n * share) == 0]

    @property
    def worker_batch(self) -> int:
        """Samples of one optimizer step that fall to one worker, at most."""
        return self.global_batch // self.fewest_workers

    @property
    def worker_micro_batch(self) -> int:
        """Samples that a worker computes at once; all while `auto` is not resolved, see `training.footprint`."""
        return self.micro_batch if isinstance(self.micro_batch, int) else self.worker_batch

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        for workers in sorted({self.fewest_workers, self.most_workers}):
            between = _told_of(self)
            if self.global_batch % workers:
                raise ValueError(f"global_batch {self.global_batch} is not divisible by workers {workers}{between}")
            if isinstance(self.micro_batch, int) and self.global_batch // workers % self.micro_batch:
                raise ValueError(
                    f"micro_batch {self.micro_batch} does not divide the {self.global_batch // workers} samples of a worker "
                    f"(global_batch {self.global_batch} / workers {workers}){between}"
                )
        if self.model.data_type_token and self.data.data_type is None:
            raise ValueError("model.data_type_token needs data.data_type: 0, 1, or a condition that the rows of type 1 meet")
        if not self.model.data_type_token and self.data.data_type is not None:
            raise ValueError(f"data.data_type is {self.data.data_type!r}, which only model.data_type_token: true reads")
        if self.global_batch % sum(self.shares):
            raise ValueError(
                f"global_batch {self.global_batch} is not divisible by {sum(self.shares)}, the sum of data.weights: write how "
                "many samples of a global batch each subset has"
            )
        if self.data.lanes is not None and (odd := [batch for batch in self.batches if batch % self.data.lanes]):
            what = f"the {odd[0]} samples of a subset in a global batch are" if self.data.weights else f"global_batch {odd[0]} is"
            raise ValueError(f"{what} not divisible by data.lanes {self.data.lanes}")
        if self.lora is not None and self.optimizer.kind == "muon":
            raise ValueError("optimizer.kind muon is for the matrices of the blocks, which lora freezes; use adamw")
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError("zero_stage 0 keeps no fp32 master weights for bf16; use zero_stage 1, or precision fp32")
        if (problem := refusal(self.zero, self.zero_stage, self.optimizer.kind, self.compile)) is not None:
            raise ValueError(problem)
        if self.schedule.decay == "plateau" and self.validation.fraction == 0:
            raise ValueError("schedule.decay plateau looks at held-out rows; give validation.fraction a value above 0")
        return self


def workers_told(config: TrainConfig) -> str:
    """``8``, or ``4 to 8``."""
    fewest, most = config.fewest_workers, config.most_workers
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


def _told_of(config: TrainConfig) -> str:
    """Which numbers of a range would do."""
    if config.fewest_workers == config.most_workers:
        return ""
    allowed = ", ".join(map(str, config.allowed_workers)) or "none fits"
    return f"; of {workers_told(config)}: {allowed}"
