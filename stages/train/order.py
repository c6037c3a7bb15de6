"""What decides which row a training reads when, and the list of its shards, in the order in which they came."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from stages.runner.contract import Job, UnitRecord
from stages.runner.graph import Planned
from stages.train.fits import json_of

ORDER_FILE = "order.json"
ORDER_STAYS = "from: the order cannot go on: {}; leave order out of keep"


def order_told(config: Any, digests: list[str]) -> dict[str, Any]:
    """All that decides which row is read when: `order.json` of a checkpoint. The shards are in the order in which they came."""
    return {
        "seed": config.seed,
        "global_batch": config.global_batch,
        "data.lanes": list(config.lanes),
        "data.order": config.data.order,
        "data.shuffle_window": config.data.shuffle_window,
        "data.where": list(config.data.where),
        "data.weights": config.data.weights,
        "validation.fraction": config.validation.fraction,
        "shards": digests,
    }


def other_reading(config: Any, before: Mapping[str, Any]) -> list[str]:
    """What a configuration has otherwise than an order that `order_told` gave, but for the shards, a line each."""
    now = order_told(config, [])
    return [f"{name}: {before[name]!r} -> {value!r}" for name, value in now.items() if name != "shards" and before[name] != value]


def order_of(store: Any, record: UnitRecord) -> dict[str, Any]:
    """What a checkpoint says of its order. Raises as `json_of`."""
    return json_of(store, record, ORDER_FILE)


def other_order(job: Job, planned: Planned, before: Mapping[str, Any]) -> list[str]:
    """What keeps the order of another training from going on in this one, a line each.

    Raises:
        KeyError: the data is not made yet.
    """
    lines = other_reading(job.config, before)
    digests = [shard.digest for shard in shards(job, planned.inputs)]
    if gone := sum((Counter(before["shards"]) - Counter(digests)).values()):
        lines.append(f"data: {gone} of {len(before['shards'])} shards are no longer there")
    return lines


class Shard(NamedTuple):
    """A shard by what knows it again, where it lies, and the subset that it is of."""

    digest: str
    address: str
    subset: str


def shards(job: Job, inputs: Iterable[str]) -> list[Shard]:
    """Every shard of these inputs; several are one list, in the order of the recipe. Where subsets have weights, a shard of
    another subset is another shard.

    Raises:
        KeyError: an input is not made yet.
    """
    found = []
    for name in inputs:
        if name.startswith("data."):
            subset = name.removeprefix("data.")
            before = f"{subset}/" if job.config.data.weights else ""
            found += [
                Shard(f"{before}{entry.sha256[:24]}", job.store.url(entry.path), subset)
                for entry in job.inputs[name].files
                if entry.name.endswith(".parquet")
            ]
    return found


def arrived(found: list[Shard], before: list[str]) -> list[Shard]:
    """Shards in the order in which they came: those of before first, as they were, then the others."""
    waiting: dict[str, list[Shard]] = {}
    for shard in found:
        waiting.setdefault(shard.digest, []).append(shard)
    first = [waiting[digest].pop(0) for digest in before]
    taken = Counter(before)
    rest = []
    for shard in found:
        if taken[shard.digest]:
            taken[shard.digest] -= 1
        else:
            rest.append(shard)
    return first + rest
