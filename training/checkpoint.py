"""A checkpoint on disk: a folder that any number of workers, with any ZeRO stage, can resume from.

    config.json, model.safetensors    the weights as trained, fp32, a native folder of `unidiffuser.weights`
    ema.safetensors                   their moving average, fp32, which sampling uses
    STATE.safetensors                 what the optimizer keeps, fp32: AdamW's exp_avg and exp_avg_sq, Muon's momentum_buffer of
                                      its matrices
    trainer.json                      step, counters, the names STATE, and what must be the same in the run that resumes
    history.jsonl                     the history so far
    adapter_...                       of a run with adapters, whose moments are those of the adapters; see `training.adapters`

Nothing random is stored: data order and noise are functions of the step. Rank 0 writes all of it, one kind of tensor at a
time, so it holds one fp32 copy of the model in memory (3.8 GB for the paper's).
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.adapters import Adapters, in_file, is_adapter
from training.begin import Growth
from training.ema import Ema
from training.history import Meter, read_history, write_history
from training.masters import Masters
from training.rates import Plateau
from unidiffuser.uvit import UViTConfig, resize_positions

# What a run with adapters keeps of each, apart and merged.
ADAPTED = ("model", "ema")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or belongs to another run; the message names the file and the fix."""


class TrainerState(BaseModel):
    """`trainer.json`. `global_batch`, `seed` and `rows` decide the order of the data, so a resumed run needs the same; `growth`
    says how many shards there were, by place of the order, which began at step `order_from`.

    `optimizer` names the files of what the optimizer keeps.
    """

    model_config = ConfigDict(extra="forbid")

    step: int
    optimizer_steps: int
    ema_updates: int
    global_batch: int
    seed: int
    rows: int
    schedule_from: int
    order_from: int
    growth: list[Growth]
    pending: dict[str, tuple[float, float]]
    optimizer: list[str]
    plateau: Plateau
    workers: int
    zero_stage: int
    precision: str


def write_checkpoint(
    folder: Path, model: UViTConfig, masters: Masters, ema: Ema, state: TrainerState, meter: Meter, adapters: Adapters | None
) -> None:
    """Write a checkpoint into a new folder. All workers call it; rank 0 writes."""
    writes = dist.get_rank() == 0
    if writes:
        folder.mkdir(parents=True)
    kinds = {"model": masters.vectors, "ema": ema.vectors, **{kind: masters.state(kind) for kind in state.optimizer}}
    for kind, vectors in kinds.items():
        tensors = masters.gather(vectors, masters.having(kind) if kind in state.optimizer else None)
        if writes and adapters is not None and kind in ADAPTED:
            adapters.write(folder, kind, tensors)
        elif writes:
            save_file(tensors, folder / f"{kind}.safetensors")
    if writes:
        (folder / "config.json").write_text(model.model_dump_json(indent=2) + "\n", encoding="utf-8")
        write_history(folder / "history.jsonl", meter.rows)
        (folder / "trainer.json").write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read; is this a checkpoint folder?") from error


def read_state(folder: str | Path) -> TrainerState:
    """`trainer.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return TrainerState.model_validate_json(_read(Path(folder, "trainer.json")))
    except ValidationError as error:
        raise CheckpointError(f"{folder}: trainer.json is damaged: {error.errors()[0]['msg']}") from error


class Checkpoint:
    """A checkpoint opened for reading, for a model whose grids may have other sizes.

    Args:
        folder: as written by `write_checkpoint`.
        model: configuration of the model that will take the weights.

    Raises:
        CheckpointError: a file is missing or damaged, or the model has another width, depth, heads or parts.
    """

    def __init__(self, folder: str | Path, model: UViTConfig) -> None:
        self.folder, self.model = Path(folder), model
        try:
            self.saved = UViTConfig.model_validate_json(_read(self.folder / "config.json"))
        except ValidationError as error:
            raise CheckpointError(f"{self.folder}: config.json is damaged: {error.errors()[0]['msg']}") from error
        self.state = read_state(self.folder)
        for field in ("width", "depth", "heads", "mlp_ratio", "data_type_token"):
            ours, theirs = getattr(model, field), getattr(self.saved, field)
            if ours != theirs:
                raise CheckpointError(f"{self.folder}: its model has {field} {theirs}, this run's has {ours}")
        try:
            self.tensor("model", "position")
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: its model does not fit the shards: {error}") from error

    def tensor(self, kind: str, name: str) -> Tensor:
        """One fp32 tensor of `model`, `ema` or a kind that the optimizer keeps; the position table in this run's size."""
        path = self.folder / f"{kind}.safetensors"
        if kind in ADAPTED and is_adapter(name):
            path, name = self.folder / f"adapter_{kind}.safetensors", in_file(name)
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read ({error})") from error
        return resize_positions({name: tensor}, self.saved, self.model)[name] if name == "position" else tensor

    def names(self) -> list[str]:
        """Names of the tensors of the model."""
        with safe_open(self.folder / "model.safetensors", framework="pt") as file:
            return list(file.keys())

    def check_same_order(self, global_batch: int, seed: int, rows: int) -> None:
        """Raise CheckpointError unless a run with these values reads the data in the order of the one that was saved."""
        for field, ours in (("global_batch", global_batch), ("seed", seed), ("rows", rows)):
            theirs = getattr(self.state, field)
            if ours != theirs:
                raise CheckpointError(
                    f"{self.folder}: saved with {field} {theirs}, this run has {ours}; leave order out of what is kept"
                )

    def restore_weights(self, masters: Masters) -> None:
        """Set the master weights exactly."""
        masters.scatter(lambda name: self.tensor("model", name), masters.vectors)

    def restore_average(self, masters: Masters, ema: Ema) -> None:
        """Set the moving average exactly."""
        masters.scatter(lambda name: self.tensor("ema", name), ema.vectors)
        ema.updates = self.state.ema_updates

    def restore_optimizer(self, masters: Masters) -> None:
        """Set what the optimizer keeps, and its step count, exactly.

        Raises:
            CheckpointError: another optimizer wrote it.
        """
        if masters.state_kinds != self.state.optimizer:
            raise CheckpointError(
                f"{self.folder}: its optimizer kept {', '.join(self.state.optimizer)}, this run's keeps "
                f"{', '.join(masters.state_kinds)}; choose the same optimizer.kind, or start without its state"
            )
        tensors = {kind: masters.empty() for kind in masters.state_kinds}
        for kind, vectors in tensors.items():
            masters.scatter(lambda name, kind=kind: self.tensor(kind, name), vectors, masters.having(kind))  # type: ignore[misc]
        masters.set_state(tensors, self.state.optimizer_steps)

    def restore_history(self, meter: Meter) -> None:
        """Set the history and the sums of the interval that was interrupted."""
        meter.rows = read_history(self.folder / "history.jsonl")
        meter.pending = dict(self.state.pending)
