"""A plan in words: blocks of a table and lines, which terminal and page show alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PAGE = "docs/how-to/plan.md has the formula of every number"


@dataclass(frozen=True)
class Block:
    """A part of a plan; `words` names the columns that are text."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    lines: Sequence[str] = ()
    words: frozenset[str] = field(default_factory=lambda: frozenset({"node", "rows are", "model"}))


def blocks(plan: Mapping[str, Any]) -> list[Block]:
    """All of a plan, in the order in which a person asks."""
    found = [_glance(plan), _rows(plan), _traffic(plan), _time(plan)]
    if plan["training"]:
        found.append(_training(plan))
        found += _memory(plan)
        found.append(_checkpoints(plan))
    return [*found, Block("", lines=[*(f"note: {note}" for note in plan["notes"]), PAGE])]


def _glance(plan: Mapping[str, Any]) -> Block:
    machine, lines = plan["machine"], []
    totals, cost = plan["totals"], plan["cost"]
    if machine["calibrated"]:
        lines.append(f"{plan['recipe']} on this machine ({machine['words']}): {duration(plan['work_seconds'])} of work")
        lines.append(f"Training: {plan['training_flop']:.4g} FLOP, {duration(plan['training_seconds'])}")
    else:
        lines.append(f"{plan['recipe']} on {machine['gpus']} {machine['gpu']} with {machine['cores']:,} CPU cores")
        lines += _training_lines(plan) if plan["training"] else []
        lines.append(f"Encoding: {plan['encode_gpu_hours']:,.0f} GPU-hours; all GPUs together {plan['gpu_hours']:,.0f}")
    lines.append(f"Fetched {size(totals['fetched_bytes'])}, stored {size(totals['stored_bytes'])}, {_requests(totals)}")
    told = [f"${cost['gpus']:,.0f} for GPUs at ${cost['gpu_hour']:g} an hour"] if "gpus" in cost else []
    told += [f"${cost['requests']:,.2f} for requests", f"${cost['store_a_month']:,.2f} a month for the store, at list prices"]
    lines.append(f"Cost: {', '.join(told)}" + ("" if machine["calibrated"] or "gpus" in cost else "; --price tells the GPUs'"))
    return Block("", lines=lines)


def _training_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    machine, tuned = plan["machine"], plan["at_45_percent"]
    yield (
        f"Training: {plan['training_flop']:.4g} FLOP, at {machine['mfu']:.1%} MFU ({machine['mfu_from']}) "
        f"{plan['training_gpu_hours']:,.0f} GPU-hours, {plan['training_days']:,.1f} days{_dollars(plan)}"
    )
    yield (f"At 45% MFU: {tuned['training_gpu_hours']:,.0f} GPU-hours, {tuned['training_days']:,.1f} days{_dollars(tuned)}")


def _dollars(told: Mapping[str, Any]) -> str:
    return f", ${told['training_cost']:,.0f}" if "training_cost" in told else ""


def _requests(told: Mapping[str, Any]) -> str:
    return f"{told['puts']:,} PUT and {told['gets']:,} GET requests"


def _rows(plan: Mapping[str, Any]) -> Block:
    rows = [(node["node"], f"{node['rows_in']:,}", f"{node['rows_out']:,}", node["rows_from"]) for node in plan["nodes"]]
    return Block("Rows", ("node", "rows in", "rows out", "rows are"), rows)


def _traffic(plan: Mapping[str, Any]) -> Block:
    rows = [
        (
            node["node"],
            *(size(node[f"{name}_bytes"]) for name in ("fetched", "read", "stored", "written")),
            f"{node['units']:,}",
            f"{node['puts']:,}",
            f"{node['gets']:,}",
        )
        for node in plan["nodes"]
    ]
    return Block("Bytes and requests", ("node", "fetched", "read", "stored", "written", "units", "PUT", "GET"), rows)


def _time(plan: Mapping[str, Any]) -> Block:
    calibrated = plan["machine"]["calibrated"]
    rows = [
        (
            node["node"],
            *(() if calibrated else (f"{node['gpu_hours']:,.1f}",)),
            duration(node["seconds"]),
            rate(node["network_bytes_per_s"]),
            rate(node["store_bytes_per_s"]),
        )
        for node in plan["nodes"]
    ]
    head = ("node", *(() if calibrated else ("GPU-hours",)), "work", "network", "store")
    return Block("Time, each node by itself", head, rows)


def _training(plan: Mapping[str, Any]) -> Block:
    head = ["node", "model", "steps", "batch", "tokens", "FLOP a sample", "FLOP"]
    if plan["machine"]["calibrated"]:
        return Block("Training", head, [_about(each) for each in plan["training"]])
    rows = [
        (
            *_about(each),
            f"{each['gpu_hours']:,.0f}",
            f"{each['days']:,.1f}",
            f"{each['steps_per_s']:.3g}",
            f"{each['samples_per_s']:,.0f}",
            rate(each["input_bytes_per_s"]),
        )
        for each in plan["training"]
    ]
    return Block("Training", [*head, "GPU-hours", "days", "steps/s", "samples/s", "input"], rows)


def _about(each: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        each["node"], f"{each['parameters'] / 1e6:,.1f} M", f"{each['steps']:,}", f"{each['global_batch']:,}",
        f"{each['tokens']:,}", f"{each['flop_per_sample']:.4g}", f"{each['flop']:.4g}",
    )  # fmt: skip


def _memory(plan: Mapping[str, Any]) -> Iterator[Block]:
    head = ("node", "ZeRO", "micro-batch", "model", "buckets", "activations", "in all", "most at once", "most, computed again")
    rows = [
        (
            each["node"],
            f"{found['zero_stage']}{' *' if found['chosen'] else ''}",
            f"{found['micro_batch']:,}",
            *(size(found[f"{name}_bytes"]) for name in ("model", "bucket", "activation")),
            size(found["bytes"]) + ("" if found["fits"] else " !"),
            *(f"{found[name]:,}" for name in ("largest_micro_batch", "largest_micro_batch_checkpointed")),
        )
        for each in plan["training"]
        for found in each.get("memory", ())
    ]
    if rows:
        lines = ["* is the recipe's, ! does not fit: what tensors hold; the most at once are samples that a GPU has room for."]
        yield Block("Memory of a GPU", head, rows, lines, frozenset({"node"}))
        sizes = [
            f"{each['node']}: {', '.join(f'{count} {size(found)}' for count, found in each['memory_by_micro_batch'].items())}"
            for each in plan["training"]
        ]
        yield Block("", lines=["By micro-batch, with the recipe's ZeRO stage:", *sizes])


def _checkpoints(plan: Mapping[str, Any]) -> Block:
    head = ["node", "each", "written", "in the store at most", "bytes there"]
    head += [] if plan["machine"]["calibrated"] else ["one every"]
    rows = [
        (
            each["node"],
            size(each["checkpoint_bytes"]),
            f"{each['checkpoints_written']:,}",
            f"{each['checkpoints_kept']:,}",
            size(each["checkpoints_kept"] * each["checkpoint_bytes"]),
            *([] if plan["machine"]["calibrated"] else [duration(each["seconds_between_checkpoints"])]),
        )
        for each in plan["training"]
    ]
    return Block("Checkpoints", head, rows)


def size(count: float) -> str:
    """
    >>> size(15_240_000_000)
    '15.2 GB'
    """
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.3g} {name}" if count < 100 * unit else f"{count / unit:,.0f} {name}"
    return f"{count:,.0f} B"


def rate(count: float) -> str:
    return f"{size(count)}/s" if count else "-"


def duration(seconds: float) -> str:
    """
    >>> duration(28 * 86400), duration(90), duration(0.5)
    ('28.0 days', '1.5 min', '0.5 s')
    """
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s"
