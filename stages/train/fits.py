"""Whether what is kept of one training can go on in another, told from what the two are trained with, before anything runs.

A checkpoint tells it in JSON files, which are read here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from infra.dataset import Dataset
from infra.queries import file_name, opened, unmarked
from infra.store import StoreError
from stages.runner.contract import Job, StageError, UnitRecord
from stages.runner.ledger import DamagedStep
from training.begin import Kept
from training.latents import LatentSpec
from training.optimizers.choice import kind_that_keeps

# Of the model, what decides the shapes of its weights.
SHAPE = ("width", "depth", "heads", "patch", "data_type_token")

MODEL_FILE, STATE_FILE, ADAPTERS_FILE = "config.json", "trainer.json", "adapter_config.json"
# Files of a checkpoint that tell what it was trained with; the last one where it was adapters.
TELLING = (MODEL_FILE, STATE_FILE, ADAPTERS_FILE)
WROTE = "name the folder of a checkpoint that a training wrote"
SAME = "write the same, or leave `from` out"
MERGED = "export it, which merges the adapters, and name the export in `weights`"


class Other(NamedTuple):
    """What it is that cannot go on, the change in the configuration that makes it so, and what a person can do to go on, if
    anything."""

    what: str
    change: str
    mend: str = ""


def other_network(old: Mapping[str, Any], new: Mapping[str, Any]) -> Other | None:
    """Why no weights of a training fit into those of another; None where they do.

    Args:
        old, new: `result_fields` of their configurations.
    """
    for name in SHAPE:
        was, now = old["model"][name], new["model"][name]
        if was != now:
            return Other(f"a model of another {name}", f"model.{name}: {was!r} -> {now!r}")
    before, after = old.get("lora"), new["lora"]
    if after is None:
        # A checkpoint of adapters has the weights with the adapters merged in.
        return None
    if before is None:
        return Other("a training of adapters", "lora: None -> a mapping", "export it, and name the export in `weights`")
    if before["rank"] != after["rank"]:
        return Other("adapters of another rank", f"lora.rank: {before['rank']} -> {after['rank']}", MERGED)
    if before["alpha"] != after["alpha"]:
        return Other("adapters of another alpha", f"lora.alpha: {before['alpha']} -> {after['alpha']}", MERGED)
    if {*before["targets"]} != {*after["targets"]}:
        change = f"lora.targets: {', '.join(before['targets'])} -> {', '.join(after['targets'])}"
        return Other("adapters of other layers", change, MERGED)
    return None


def other_optimizer(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The change after which nothing that the optimizer has kept can go on; None where it can. Arguments as `other_network`."""
    was, now = old["optimizer"]["kind"], new["optimizer"]["kind"]
    if was != now:
        return f"optimizer.kind: {was!r} -> {now!r}"
    return "lora: a mapping -> None" if old.get("lora") is not None and new["lora"] is None else None


def told_by(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the files of a checkpoint tell of its training's configuration, of which the rest is unknown.

    Args:
        files: content of `TELLING` by name.
    """
    model, adapters = files[MODEL_FILE], files.get(ADAPTERS_FILE)
    parts = [part for modality in model["modalities"] for part in modality["parts"]]
    patch = next((part["patch"] for part in parts if _is_grid(part["shape"])), None)
    return {
        "model": {name: patch if name == "patch" else model[name] for name in SHAPE},
        "optimizer": {"kind": kind_that_keeps(files[STATE_FILE]["optimizer"])},
        "lora": adapters and {
            "rank": adapters["r"], "alpha": adapters["lora_alpha"], "targets": adapters["target_modules"]
        },
    }  # fmt: skip


def other_parts(job: Job, read: Callable[[], Mapping[str, Any]]) -> str | None:
    """Which parts of the data have another shape than in a model, and what would make them fit, as far as the data is made.

    Args:
        read: gives config.json of the model's checkpoint.
    """
    for name, dataset in job.inputs.items():
        if not name.startswith("data.") or (spec := _spec(dataset)) is None:
            continue
        shapes = {"latent": spec.latent, "clip": spec.clip, "text": spec.text}
        ours = {part: _fixed(shape) for part, shape in shapes.items() if shape is not None}
        theirs = {part["name"]: _fixed(part["shape"]) for modality in read()["modalities"] for part in modality["parts"]}
        if ours != theirs:
            # It takes torch.
            from training.weights import shapes_to_change

            return "; ".join(shapes_to_change(theirs, ours))
    return None


def _fixed(shape: Collection[int]) -> tuple[int, ...]:
    """Of a grid, whose sides may differ, the channels."""
    return tuple(shape)[:1] if _is_grid(shape) else tuple(shape)


def _is_grid(shape: Collection[int]) -> bool:
    return len(shape) == 3


def _spec(dataset: Dataset) -> LatentSpec | None:
    """Shapes of a dataset's rows; None where its first shard cannot be read, which is said when it is to be trained on."""
    entry = next((entry for entry in dataset.files if entry.name.endswith(".parquet")), None)
    with suppress(OSError, ValueError, pa.ArrowException):
        if entry is not None:
            with dataset.open(entry) as file:
                return LatentSpec.of(pq.read_schema(file), entry.name)
    return None


def why_not(old: Mapping[str, Any], new: Mapping[str, Any], keep: Collection[Kept]) -> str | None:
    """Why what is kept cannot go on, but for the order, with what would make it fit; None where it can. Arguments as
    `other_network`."""
    if (other := other_network(old, new)) is not None:
        return f"from: {other.what} cannot go on from it ({other.change}): {other.mend or SAME}"
    if "optimizer" in keep and (change := other_optimizer(old, new)) is not None:
        return f"from: what an optimizer keeps is of no use to another ({change}); leave it out of keep"
    return None


def json_of(store: Any, record: UnitRecord, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint.

    Raises:
        DamagedStep: it is damaged or gone.
    """
    entry = record.file(name)
    try:
        data = store.read(entry.path)
    except StoreError as error:
        raise DamagedStep(str(error), record.key) from None
    if sha256(data).hexdigest() != entry.sha256:
        raise DamagedStep(f"{store.url(entry.path)}: damaged (its record tells another sha256)", record.key)
    return cast(dict[str, Any], json.loads(data))


def outside(job: Job, sources: Iterable[str], name: str) -> dict[str, Any]:
    """A JSON file of the folder that is named. Raises StageError where it holds no JSON."""
    address = next(address for address in sources if file_name(address) == name)
    with opened(address) as file:
        try:
            return cast(dict[str, Any], json.loads(file.read()))
        except ValueError as error:
            raise StageError(f"{job.node}: from: {unmarked(address)} is damaged ({error}); {WROTE}") from None
