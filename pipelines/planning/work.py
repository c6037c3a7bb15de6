"""What each node moves and computes, whoever does it: bytes from the internet and of the store, requests, units, FLOP."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from infra.s3 import PART
from pipelines.planning import corpora
from pipelines.planning.encoders import autoencoder, clip
from pipelines.planning.rows import Flow
from pipelines.planning.training import Training, shapes_of
from stages.measuring.phases import samples_wanted
from stages.measuring.samples import Asked, Samples
from stages.runner.contract import result_fields
from stages.runner.recipe import Node, Recipe
from stages.world.stage import ROW_BYTES, SHARD_ROWS

# Bytes a row: of select's tables with the keys of URL and hash, of download's table of outcomes, of filter's table, scores and
# bands of hashes, and of encode's key, caption and scores.
SELECTED, OUTCOME, TABLE, SCORED, BANDS, DESCRIBED = 175 + 2 * 10.8, 100, 1300, 1200, 13 * 60, 200
# Rows of a file of LAION's metadata: 128 files have 2.32 billion.
FILE_ROWS = 18e6
# The text decoder: numbers of GPT-2, its tokens of a caption behind those of the latent.
GPT2, WORDS = 124e6, 20
# Bytes of a drawn picture, and samples of a unit.
DRAWN, DRAWN_AT_ONCE = 100e3, 25


@dataclass(frozen=True)
class Work:
    """A node's share of a plan.

    Bytes `fetched` come from outside the store; `read` and `stored` are the store's; `written` counts what gives way again too.
    `flop` is of encoders and of training; `wide` says how many workers can be at it at once.
    """

    node: str
    stage: str
    flow: Flow
    fetched: float = 0.0
    read: float = 0.0
    stored: float = 0.0
    written: float = 0.0
    units: float = 1.0
    puts: float = 0.0
    gets: float = 0.0
    flop: float = 0.0
    wide: float = 1.0

    @property
    def rows_in(self) -> float:
        return self.flow.rows_in

    @property
    def rows_out(self) -> float:
        return self.flow.rows_out


def works(recipe: Recipe, rows: dict[str, Flow], trained: Iterable[Training]) -> list[Work]:
    """What every node takes, in the order of the recipe."""
    found: dict[str, Work] = {}
    by_node = {training.node: training for training in trained}
    for node in recipe.nodes.values():
        before = found.get(node.inputs.get("rows", ""))
        if node.stage == "train":
            work = _train(by_node[node.name])
        elif node.stage in ("text-codec", "evaluate", "export"):
            work = _single(recipe, node, rows, by_node)
        else:
            work = _of_rows(recipe, node, rows[node.name], before, scored_before(recipe, node))
        found[node.name] = _measured(work)
    return list(found.values())


def scored_before(recipe: Recipe, node: Node) -> bool:
    """Whether an earlier filter measures the same rows in the same way: their scores are shared."""
    for other in recipe.nodes.values():
        if other is node:
            return False
        if node.stage == other.stage == "filter" and other.inputs == node.inputs and _scores(other) == _scores(node):
            return True
    return False


def _scores(node: Node) -> Any:
    fields = result_fields(node.config)
    return [node.config.clip, *(fields.get(name) for name in ("clip_scores", "heads", "precision"))]  # type: ignore[attr-defined]


def _measured(work: Work) -> Work:
    """With the bytes that a dataset in the store had of each row, where there is one."""
    if work.flow.bytes is None:
        return work
    stored = work.flow.bytes * work.rows_out
    return replace(work, stored=stored, written=work.written + stored - work.stored)


def _of_rows(recipe: Recipe, node: Node, flow: Flow, before: Work | None, scored: bool) -> Work:
    config: Any = node.config
    shards = before.units if before is not None else 1.0
    unit = (node.name, node.stage, flow)
    if node.stage == "select":
        shards, files = math.ceil(flow.rows_out / config.shard_rows), math.ceil(flow.rows_in / FILE_ROWS)
        stored = flow.rows_out * SELECTED
        requests = _requests(2 * files, stored, shards + 2 * files, flow.rows_in * 10.8)
        return Work(*unit, corpora.ROW * flow.rows_in, 0, stored, stored, shards, *requests, wide=files)
    if node.stage == "world":
        stored = float(ROW_BYTES * flow.rows_out)
        shards = math.ceil(flow.rows_out / SHARD_ROWS)
        return Work(*unit, 0, 0, stored, stored, shards, *_requests(shards, stored, shards, 0), wide=shards)
    if node.stage in ("download", "folder"):
        size = config.image_size if node.stage == "download" else max(flow.side, 512)
        shards = shards if before is not None else math.ceil(flow.rows_out / config.shard_rows)
        read = before.stored if before is not None else 0.0
        stored = flow.rows_out * flow.corpus.stored(size) + flow.rows_in * OUTCOME
        fetched = flow.rows_out * flow.corpus.sent if node.stage == "download" else stored
        return Work(*unit, fetched, read, stored, stored, shards, *_requests(shards, stored, 2 * shards, read), wide=shards)
    assert before is not None
    if node.stage == "filter":
        kept = before.stored / max(before.rows_out, 1) * flow.rows_out
        scores = 0.0 if scored else flow.rows_in * (SCORED + BANDS)
        read = before.stored * (1 if scored else 2)
        flop = 0.0
        if config.clip_scores and not scored:
            flop = flow.rows_in * (clip(config.clip).image.flop + clip(config.clip).text.flop)
        stored = kept + flow.rows_out * TABLE
        requests = _requests((3 if scored else 5) * shards, stored + scores, (3 if scored else 5) * shards, read)
        return Work(*unit, 0, read, stored, stored + scores, shards, *requests, flop, shards)
    stored = flow.rows_out * (shapes_of(recipe, node.name).row_bytes + DESCRIBED)
    seen = 0 if passed_on(recipe, node) else clip(config.clip).image.flop
    flop = flow.rows_in * (autoencoder(config.vae).flop(config.size) + seen + clip(config.text).text.flop)
    return Work(*unit, 0, before.stored, stored, stored, shards, *_requests(shards, stored, shards, before.stored), flop, shards)


def passed_on(recipe: Recipe, node: Node) -> bool:
    """Whether encode finds the embeddings of its images in the filter's table, see `stages.encode.stage`."""
    config: Any = node.config
    given = recipe.nodes[node.inputs["rows"]]
    told: Any = given.config
    return given.stage == "filter" and told.clip_scores and (told.clip, told.precision) == (config.clip, config.precision)


def _requests(units: float, written: float, files: float, read: float) -> tuple[float, float]:
    """PUT and GET or HEAD requests: of a unit its record and what it begins with, of every file its parts."""
    return 2 * units + _parts(written, files), 4 * units + _parts(read, units)


def _parts(size: float, files: float) -> float:
    """Requests that move so many bytes in so many files: one a file, or one a part of a large one and two around them."""
    each = size / max(files, 1)
    return files * (1 if each <= PART else math.ceil(each / PART) + 2)


def _train(training: Training) -> Work:
    config = training.config
    stored = float(training.kept * training.checkpoint)
    written = float(training.checkpoints * training.checkpoint)
    shares = training.checkpoints * config.fewest_workers
    puts, _ = _requests(training.checkpoints, written, shares, 0)
    rows = Flow(training.samples, training.samples, "steps x global batch")
    return Work(
        training.node, "train", rows, 0, training.read, stored, written, training.checkpoints, puts, training.gets,
        float(training.flop), math.inf,
    )  # fmt: skip


def _single(recipe: Recipe, node: Node, rows: dict[str, Flow], trained: dict[str, Training]) -> Work:
    """Nodes of few rows: the text codec, evaluation, export."""
    config: Any = node.config
    if node.stage == "text-codec":
        captions = min(rows[node.inputs["captions"]].rows_out, config.max_captions)
        flow = Flow(captions, captions, f"the first {config.max_captions:,} captions at most")
        tokens = clip(config.text).text.tokens + WORDS
        flop = 0.0 if config.weights else config.steps * config.batch * (6 * GPT2 * tokens + clip(config.text).text.flop)
        return Work(node.name, node.stage, flow, 0, captions * SELECTED, 2 * GPT2, 2 * GPT2, 1, 6, 6, flop)
    training = trained[node.inputs["checkpoint"]]
    if node.stage == "export":
        size = training.checkpoint / 4 * (1 + len(config.layouts))
        return Work(node.name, node.stage, Flow(1, 1, "one model"), 0, training.checkpoint, size, size, 1, 10, 10)
    samples = drawn(config)
    count = sum(samples.values())
    # A forward pass is a third of training on a sample; guidance makes two of each call.
    calls = 2 if config.guidance else 1
    flop = sum(kind.steps * number for kind, number in samples.items()) * calls * training.sample_flop / 3
    stored = DRAWN * count
    requests = _requests(count / DRAWN_AT_ONCE, stored, count / DRAWN_AT_ONCE, training.checkpoint)
    flow = Flow(count, count, "samples that its measures ask for")
    units = math.ceil(count / DRAWN_AT_ONCE)
    return Work(node.name, node.stage, flow, 0, training.checkpoint, stored, stored, units, *requests, flop, units)


def drawn(config: Any) -> dict[Samples, int]:
    """How many samples of each kind an evaluation draws, as if its held-out data had all that it asks for, pictures too."""
    way = Samples("t2i", config.steps, config.guidance, config.sampler, config.beams)
    return samples_wanted(config, Asked(config.count, True, way, config.before is not None))
