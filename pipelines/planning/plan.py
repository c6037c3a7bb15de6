"""A plan: everything that a recipe will take, as one JSON object that the table, the page and scripts are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.dataset import pointed
from infra.store import Store
from pipelines.planning import cluster
from pipelines.planning.cluster import Cluster, request_cost
from pipelines.planning.devices import Gpu
from pipelines.planning.rows import flows
from pipelines.planning.training import Training, by_micro_batch, memory, trainings, weights
from pipelines.planning.work import Work, works
from stages.runner.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Wish:
    """What a plan is asked about: GPUs, or with None this machine; utilisation and dollars a GPU-hour where they are stated."""

    gpu: Gpu | None = None
    gpus: int | None = None
    mfu: float | None = None
    price: float | None = None


@dataclass(frozen=True)
class Asked:
    """A recipe as a plan sees it."""

    recipe: Recipe
    trainings: tuple[Training, ...]
    works: tuple[Work, ...]


def asked_of(recipe: Recipe, store: Store) -> Asked:
    """Rows, bytes and arithmetic of a recipe.

    Raises:
        RecipeError: an encoder that it names is not there, or its configuration is damaged.
    """
    try:
        trained = tuple(trainings(recipe))
        return Asked(recipe, trained, tuple(works(recipe, flows(recipe, store), trained)))
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"encoders: {error}") from None


def on_cluster(asked: Asked, store: Store, wish: Wish) -> dict[str, Any]:
    """The plan of a recipe on GPUs that are named."""
    assert wish.gpu is not None
    gpus = wish.gpus or max((training.config.most_workers for training in asked.trainings), default=1)
    mfu, said = _mfu(asked, store, wish)
    where = Cluster(wish.gpu, gpus, mfu, said)
    hours = {training.node: where.training_hours(training) for training in asked.trainings}
    hours |= {work.node: where.gpu_hours(work) for work in asked.works if work.node not in hours}
    seconds = {work.node: where.seconds(work, hours[work.node]) for work in asked.works}
    machine = {"gpu": wish.gpu.name, "gpus": gpus, "cores": where.cores, "mfu": mfu, "mfu_from": said, "calibrated": False}
    told = _told(asked, machine, seconds, hours)
    trained = sum(hours[training.node] for training in asked.trainings)
    tuned = sum(where.training_hours(training, cluster.TUNED) for training in asked.trainings)
    told |= _training_time(trained, gpus, wish.price)
    told["at_45_percent"] = _training_time(tuned, gpus, wish.price)
    told["training"] = [_training(training, where, hours[training.node]) for training in asked.trainings]
    told["cost"] = _cost(told, wish.price)
    told["notes"] = _notes(asked, gpus)
    return told


def on_this_machine(asked: Asked, machine: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The plan of a recipe here, with the seconds of work that a calibration foretells.

    Args:
        machine: what was measured, which goes into the plan.
        seconds: by node.
    """
    told = _told(asked, dict(machine) | {"calibrated": True}, seconds, {})
    told["training_gpu_hours"] = told["training_seconds"] * machine["gpus"] / 3600
    told["training"] = [_training(training, None, 0.0) for training in asked.trainings]
    told["cost"] = _cost(told, None)
    told["notes"] = _notes(asked, None)
    return told


def _mfu(asked: Asked, store: Store, wish: Wish) -> tuple[float, str]:
    """Utilisation and where it is from: stated, measured by a training of the recipe, or what is usual."""
    if wish.mfu is not None:
        return wish.mfu, "stated"
    for training in reversed(asked.trainings):
        made = pointed(store, asked.recipe.name, training.node)
        found = made.manifest.summary.get("metrics", {}).get("mfu") if made is not None else None
        if found:
            return float(found), f"measured by {training.node}"
    return cluster.USUAL, "assumed; published: 22 to 37%"


def _told(asked: Asked, machine: dict[str, Any], seconds: Mapping[str, float], hours: Mapping[str, float]) -> dict[str, Any]:
    nodes = [_node(work, seconds[work.node], hours.get(work.node, 0.0)) for work in asked.works]
    totals = {name: sum(node[name] for node in nodes) for name in ("fetched_bytes", "stored_bytes", "puts", "gets", "seconds")}
    trained = {training.node for training in asked.trainings}
    return {
        "recipe": asked.recipe.name,
        "machine": machine,
        "training_flop": sum(training.flop for training in asked.trainings),
        "encode_gpu_hours": sum(hours.get(work.node, 0.0) for work in asked.works if work.stage == "encode"),
        "gpu_hours": sum(hours.values()),
        "work_seconds": totals["seconds"],
        "training_seconds": sum(seconds[node] for node in trained),
        "nodes": nodes,
        "totals": totals,
    }


def _node(work: Work, seconds: float, gpu_hours: float) -> dict[str, Any]:
    return {
        "node": work.node,
        "stage": work.stage,
        "rows_in": round(work.rows_in),
        "rows_out": round(work.rows_out),
        "rows_from": work.flow.source,
        "fetched_bytes": round(work.fetched),
        "read_bytes": round(work.read),
        "stored_bytes": round(work.stored),
        "written_bytes": round(work.written),
        "units": round(work.units),
        "puts": round(work.puts),
        "gets": round(work.gets),
        "flop": work.flop,
        "gpu_hours": gpu_hours,
        "seconds": seconds,
        "network_bytes_per_s": _rate(work.fetched, seconds),
        "store_bytes_per_s": _rate(work.read + work.written, seconds),
    }


def _rate(count: float, seconds: float) -> int:
    """Bytes a second; 0 of what takes no time of its own."""
    return round(count / seconds) if seconds >= 1 else 0


def _training(training: Training, where: Cluster | None, hours: float) -> dict[str, Any]:
    config = training.config
    told: dict[str, Any] = {
        "node": training.node,
        "steps": training.steps,
        "global_batch": config.global_batch,
        "samples": training.samples,
        "tokens": training.tokens,
        "parameters": weights(training),
        "flop_per_sample": training.sample_flop,
        "flop": training.flop,
        "checkpoint_bytes": training.checkpoint,
        "checkpoints_written": training.checkpoints,
        "checkpoints_kept": training.kept,
        "input_bytes": training.read,
    }
    if where is None:
        return told
    steps_per_s = training.steps / max(hours * 3600 / where.gpus, 1e-9)
    told |= {
        "gpu_hours": hours,
        "days": hours / where.gpus / 24,
        "steps_per_s": steps_per_s,
        "samples_per_s": steps_per_s * config.global_batch,
        "input_bytes_per_s": steps_per_s * config.global_batch * training.shapes.row_bytes,
        "seconds_between_checkpoints": config.checkpoint_every / steps_per_s if steps_per_s else 0.0,
        "memory": [
            {
                "zero_stage": each.zero_stage,
                "chosen": each.zero_stage == config.zero_stage,
                "micro_batch": each.micro_batch,
                "bytes": each.bytes,
                "model_bytes": each.footprint.model,
                "bucket_bytes": each.footprint.buckets,
                "activation_bytes": each.footprint.activations,
                "offloaded_bytes": each.footprint.offloaded,
                "fits": each.bytes <= where.gpu.memory,
                "largest_micro_batch": each.most,
                "largest_micro_batch_checkpointed": each.most_again,
            }
            for each in memory(training, where.gpu, where.gpus)
        ],
        "memory_by_micro_batch": by_micro_batch(training, where.gpu, where.gpus),
    }
    return told


def _training_time(hours: float, gpus: int, price: float | None) -> dict[str, Any]:
    dollars = {} if price is None else {"training_cost": hours * price}
    return {"training_gpu_hours": hours, "training_days": hours / gpus / 24, **dollars}


def _cost(told: Mapping[str, Any], price: float | None) -> dict[str, Any]:
    """Dollars: GPU-hours at the price that is given, requests and a month of the store at list prices."""
    requests = request_cost(told["totals"]["puts"], told["totals"]["gets"])
    month = told["totals"]["stored_bytes"] / 1e12 * cluster.STORED
    gpus = {} if price is None else {"gpu_hour": price, "gpus": told["gpu_hours"] * price}
    return {**gpus, "requests": requests, "store_a_month": month}


def _notes(asked: Asked, gpus: int | None) -> list[str]:
    """What a person must know before taking the numbers."""
    notes = [f"{work.node}: {work.flow.source}" for work in asked.works if work.flow.source.startswith("unknown")]
    for training in asked.trainings if gpus is not None else ():
        batch = training.config.global_batch
        if batch % (gpus or 1):
            notes.append(f"{training.node}: global_batch {batch:,} is not divisible by {gpus} GPUs; a run would be refused")
    return notes
