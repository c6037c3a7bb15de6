"""A checkpoint on disk: a folder that any number of workers, with any ZeRO stage, can resume from.

    config.json           the model's configuration, as in a native folder of `unidiffuser.weights`
    share-....safetensors the weights as trained, their moving average, which sampling uses, and what the optimizer keeps (AdamW's
                          exp_avg and exp_avg_sq, Muon's momentum_buffer of its matrices), all fp32; see `training.shares`
    trainer.json          step, counters, the names of what the optimizer keeps, and what must be the same in the run that resumes
    history.jsonl         the history so far
    adapter_..., model.safetensors, ema.safetensors
                          of a run with adapters, whose shares hold nothing else; see `training.adapters`

Nothing random is stored: data order and noise are functions of the step. Every worker writes a share; see `training.saving`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.adapters import A, Adapters, is_adapter
from training.begin import Growth
from training.damage import Damage
from training.ema import Ema
from training.history import Meter, history_text, read_history
from training.masters import Masters
from training.rates import Plateau
from training.saving import Piece
from training.shares import DamagedShare, Shares, key_of
from training.weights import parts_to_change
from unidiffuser.modalities import token_order
from unidiffuser.uvit import UViTConfig, resize_positions

COPIED_AT_ONCE = 2**22


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or belongs to another run; the message names the file and the fix."""


class TrainerState(BaseModel):
    """`trainer.json`. `global_batch`, `seed` and `rows` decide the order of the data, so a resumed run needs the same; `growth`
    says how many shards there were, by place of the order, which began at step `order_from`.

    `optimizer` names the kinds of what the optimizer keeps, `damage` is what the training has met.
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
    damage: Damage
    workers: int
    zero_stage: int
    precision: str


def pieces_of(masters: Masters, ema: Ema) -> list[Piece]:
    """What this worker writes: key and flat vector of each piece, which are the training's own."""
    kinds = {"model": masters.vectors, "ema": ema.vectors, **{kind: masters.state(kind) for kind in masters.state_kinds}}
    return [
        (key_of(kind, name, place.parameter_start), vectors[place.vector].detach().view(-1).narrow(0, place.start, place.length))
        for kind, vectors in kinds.items()
        for name, place in masters.owned(masters.having(kind) if kind in masters.state_kinds else list(masters.shapes))
    ]


def told_by_shares(masters: Masters) -> dict[str, str]:
    """The metadata of every share."""
    return {"shapes": json.dumps({name: list(shape) for name, shape in masters.shapes.items()})}


def other_files(
    model: UViTConfig, masters: Masters, ema: Ema, state: TrainerState, meter: Meter, adapters: Adapters | None
) -> Callable[[], Iterator[tuple[str, Iterator[bytes]]]]:
    """What gives all files but the shares, by name and piece by piece, on rank 0. All workers must call this."""
    adapted = {}
    if adapters is not None:
        adapted = {"model": masters.gather(masters.vectors), "ema": masters.gather(ema.vectors)}
    texts = {"config.json": model.model_dump_json(indent=2), "trainer.json": state.model_dump_json(indent=2)}
    rows = list(meter.rows)

    def files() -> Iterator[tuple[str, Iterator[bytes]]]:
        for name, text in texts.items():
            yield name, iter([f"{text}\n".encode()])
        yield "history.jsonl", iter([history_text(rows).encode()])
        if adapters is not None:
            with tempfile.TemporaryDirectory(prefix="unidiffuser-adapters-") as folder:
                for kind, tensors in adapted.items():
                    adapters.write(Path(folder), kind, tensors)
                for path in sorted(Path(folder).iterdir()):
                    yield path.name, _in_pieces(path)

    return files


def _in_pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(COPIED_AT_ONCE):
            yield data


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


def _field(model: UViTConfig, name: str) -> object:
    return next(part.patch for part in token_order(model.modalities) if part.is_grid) if name == "patch" else getattr(model, name)


class Checkpoint:
    """A checkpoint opened for reading, for a model whose grids may have other sizes.

    Args:
        folder: as `training.saving` has it written.
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
        for field in ("width", "depth", "heads", "mlp_ratio", "data_type_token", "patch"):
            ours, theirs = (_field(config, field) for config in (model, self.saved))
            if ours != theirs:
                raise CheckpointError(f"{self.folder}: its model has {field} {theirs}, this run's has {ours}")
        if wrong := parts_to_change(self.saved, model):
            raise CheckpointError(f"{self.folder}: its model does not fit the shards: {'; '.join(wrong)}")
        try:
            self.shares = Shares(self.folder)
        except DamagedShare as error:
            raise CheckpointError(str(error)) from error
        try:
            self.tensor("model", "position")
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: its model does not fit the shards: {error}") from error

    def tensor(self, kind: str, name: str) -> Tensor:
        """One fp32 tensor of `model`, `ema` or a kind that the optimizer keeps; the position table in this run's size."""
        tensor = self._adapted(kind, name) if name not in self.shares.shapes else self.shares.tensor(kind, name)
        return resize_positions({name: tensor}, self.saved, self.model)[name] if name == "position" else tensor

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Numbers of a flattened tensor from `start` on, (length,)."""
        if name == "position" or name not in self.shares.shapes:
            return self.tensor(kind, name).reshape(-1)[start : start + length]
        return self.shares.read(kind, name, start, length)

    def _adapted(self, kind: str, name: str) -> Tensor:
        """A tensor that a run with adapters has not trained, which lies in files with the adapters merged in."""
        path = self.folder / f"{kind}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read ({error})") from error

    def names(self) -> list[str]:
        """Names of the tensors of the model."""
        if "position" in self.shares.shapes:
            return self.shares.names("model")
        with safe_open(self.folder / "model.safetensors", framework="pt") as file:
            return list(file.keys())

    def check_adapters(self, adapters: Mapping[str, tuple[int, ...]]) -> None:
        """Whether a run with these adapters, shapes by name, can take over those that were saved: what is left out would be lost.

        Raises:
            CheckpointError: it cannot, or has adapters where none were saved.
        """
        saved = {name: shape for name, shape in self.shares.shapes.items() if is_adapter(name)}
        if adapters and not saved:
            raise CheckpointError(f"{self.folder}: its training had no lora; name it in `weights` for adapters to begin on it")
        mend = "export it, which merges the adapters, and name the export in `weights`"
        for name in sorted(adapters.keys() ^ saved.keys()) if adapters else ():
            layer, whose = name.partition(".lora_")[0], "this run" if name in adapters else "it"
            raise CheckpointError(f"{self.folder}: lora.targets: only {whose} has adapters on {layer}; {mend}")
        for name, shape in adapters.items():
            if shape != saved[name] and name.endswith(A):
                theirs, ours = saved[name][0], shape[0]
                raise CheckpointError(f"{self.folder}: lora.rank: its adapters have {theirs}, this run's {ours}; {mend}")

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
        masters.scatter(partial(self.read, "model"), masters.vectors)

    def restore_average(self, masters: Masters, ema: Ema) -> None:
        """Set the moving average exactly."""
        masters.scatter(partial(self.read, "ema"), ema.vectors)
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
        if lost := [name for name in masters.shapes if name not in self.shares.shapes]:
            raise CheckpointError(
                f"{self.folder}: its optimizer kept what its adapters need, and nothing of {lost[0]}; leave optimizer out of keep"
            )
        tensors = {kind: masters.empty() for kind in masters.state_kinds}
        for kind, vectors in tensors.items():
            masters.scatter(partial(self.read, kind), vectors, masters.having(kind))
        masters.set_state(tensors, self.state.optimizer_steps)

    def restore_history(self, meter: Meter) -> None:
        """Set the history and the sums of the interval that was interrupted."""
        meter.rows = read_history(self.folder / "history.jsonl")
        meter.pending = dict(self.state.pending)
