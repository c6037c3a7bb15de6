"""Rows through the funnel: measured where the store has a dataset of the node or files are here, else what is known of LAION."""

from __future__ import annotations

import glob
import math
import os
from dataclasses import dataclass
from typing import Any

from infra.dataset import Dataset, pointed
from infra.store import Store
from pipelines.planning.corpora import OWN, Corpus, corpus_of
from stages.catalog import ROW_STAGES
from stages.runner.graph import changed_fields
from stages.runner.recipe import Node, Recipe
from stages.select.stage import SelectConfig

# Metadata files whose rows are counted; what the others have is told by their bytes.
COUNTED = 16


@dataclass(frozen=True)
class Flow:
    """Rows of a node, in and out, and where both are from.

    Attributes:
        corpus: the set that they are of.
        bytes: what a row out takes in the store, where that was measured.
        side: the least pixels of a picture's shorter side.
    """

    rows_in: float
    rows_out: float
    source: str
    corpus: Corpus = OWN
    bytes: float | None = None
    side: int = 1


def flows(recipe: Recipe, store: Store) -> dict[str, Flow]:
    """The rows of every node that has rows, in the order of the recipe."""
    found: dict[str, Flow] = {}
    for node in recipe.nodes.values():
        if node.stage in ROW_STAGES:
            found[node.name] = _flow(node, pointed(store, recipe.name, node.name), found.get(node.inputs.get("rows", "")))
    return found


def _flow(node: Node, made: Dataset | None, before: Flow | None) -> Flow:
    corpus = before.corpus if before is not None else corpus_of(node.config) if node.stage == "select" else OWN
    rows_in, source = (before.rows_out, "") if before is not None else _first(node, made, corpus)
    side = before.side if before is not None else 1
    after = max(side, *(getattr(node.config, name, None) or 1 for name in ("min_side", "min_image_size")))
    # A pilot that took a sample tells of the rows that were in it.
    if made is not None and (count := made.manifest.stats.rows_in - made.manifest.stats.dropped.get("not_sampled", 0)):
        kept = made.manifest.stats.rows_out
        told = f"measured: {kept:,} of {count:,}{_other(node, made)}"
        rate, size = kept / count * (getattr(node.config, "sample", None) or 1), _bytes(made) / max(kept, 1)
        return Flow(rows_in, rows_in * rate, told, corpus, size, after)
    rate, why = _rate(node, corpus, side)
    return Flow(rows_in, rows_in * rate, "; ".join(part for part in (source, why) if part), corpus, None, after)


def _bytes(made: Dataset) -> int:
    return sum(entry.bytes for entry in made.files)


def _other(node: Node, made: Dataset) -> str:
    """What is configured otherwise now than it was when it was measured."""
    fields = [change.partition(":")[0] for change in changed_fields(made.manifest.config, node.config, ["sample"])]
    return f", with another {', '.join(fields)}" if fields else ""


def _first(node: Node, made: Dataset | None, corpus: Corpus) -> tuple[float, str]:
    """Rows that a node without rows before it begins with, and how they are known."""
    config: Any = node.config
    if node.stage == "world":
        return float(config.rows), "the recipe's own"
    patterns = config.metadata if isinstance(config, SelectConfig) else config.images
    files = [path for pattern in patterns if "://" not in pattern for path in glob.iglob(pattern, recursive=True)]
    if files:
        return (_parquet_rows(files), f"counted in {len(files)} files") if node.stage == "select" else (len(files), "files")
    if made is not None:
        return float(made.manifest.stats.rows_in), ""
    if corpus is OWN:
        return 0.0, "unknown: no such files here, and no set of LAION's; its rows count as 0"
    return corpus.rows, f"{corpus.name}'s {corpus.rows:,.0f}"


def _parquet_rows(files: list[str]) -> float:
    """Rows of Parquet files, by the footers of the first and the bytes of all."""
    import pyarrow.parquet as pq

    looked = sorted(files)[:COUNTED]
    rows = sum(pq.read_metadata(file).num_rows for file in looked)
    return rows * sum(map(os.path.getsize, files)) / max(sum(map(os.path.getsize, looked)), 1)


def _rate(node: Node, corpus: Corpus, side: int) -> tuple[float, str]:
    """The share of rows that stay by what is known of their set, and of what it is made."""
    config: Any = node.config
    parts: dict[str, float] = {}
    if node.stage == "select":
        sides = [given for given in (config.min_side, config.min_width, config.min_height) if given is not None]
        parts[f"{max(sides, default=1)} px"] = corpus.share_of_side(max(sides, default=None))
        parts["safe"] = 1.0 if config.max_punsafe is None else corpus.safe
        parts["no watermark"] = 1.0 if config.max_pwatermark is None else corpus.unmarked
        parts["aesthetic"] = 1.0 if config.min_aesthetic is None else corpus.aesthetic
        parts["sample"] = config.sample or 1.0
    elif node.stage == "download":
        parts["links alive"] = corpus.alive
    elif node.stage == "filter":
        parts[f"{config.min_side} px"] = corpus.share_of_side(config.min_side, side)
        parts["no near duplicates"] = 1.0 if config.duplicate_tolerance is None else corpus.distinct
        parts["aesthetic"] = 1.0 if config.min_aesthetic is None else corpus.aesthetic
    elif node.stage == "encode":
        parts["large enough"] = corpus.share_of_side(config.size, side)
    told = ", ".join(f"{name} {share:.1%}" for name, share in parts.items() if share != 1) or "all stay"
    return math.prod(parts.values()), f"{'LAION' if 'laion' in corpus.name else corpus.name or 'own'}: {told}"
