"""filter: looks at the pixels and the captions of what was downloaded, and keeps the rows worth encoding.

    score   a unit per shard: decode, measure, embed with CLIP, compute the heads' scores; depends on no threshold
    survey, compare, settle   which rows that meet the conditions look like a larger one: see `stages.filter.duplicates`
    centres, members, meaning   with `semantic`, which of the others show the same: see `stages.filter.meaning`
    write   a unit per shard: the rows that meet the conditions and are no near duplicates, as a WebDataset shard

Beside each ``SHARD.tar`` lies ``SHARD.parquet`` with what was measured, the CLIP embedding included. A unit of the last phase is
decided by its own shard and its own near duplicates, so a shard that is appended leaves those before it as they are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from stages.filter import duplicates, meaning
from stages.filter.heads import Heads, Scorer, head_digests
from stages.filter.histogram import histogram_of, join
from stages.filter.likeness import COLOUR_BYTES, HASH_BYTES
from stages.filter.look import Look, Looking
from stages.filter.meaning import SemanticConfig, check_semantic
from stages.runner.contract import (
    Job,
    NodeConfig,
    Output,
    Phase,
    Records,
    Resources,
    Stage,
    StageError,
    Unit,
    UnitRecord,
    operational,
)
from stages.runner.recipe import encoder
from stages.runner.skipping import skipped_shards
from stages.shards.box import boxed
from stages.shards.conditions import conditions
from stages.shards.feed import ahead, cpus_each, feeders
from stages.shards.scores import METADATA_SCORES, SCORES
from stages.shards.tables import read_table, write_table
from stages.shards.tar import Sample, ShardWriter, in_batches, read_shard
from stages.shards.words import WORDS
from unidiffuser.images import PictureError
from unidiffuser.references import weights_digest

log = logging.getLogger("stages")

# DataComp's basic filter (arXiv 2304.14108, appendix): more than 2 words and 5 characters of English, 200 pixels, ratio 3.
BASIC: dict[str, Any] = {"min_side": 200, "max_aspect_ratio": 3.0, "min_caption_chars": 6, "min_caption_words": 3}
PRESETS: dict[str, dict[str, Any]] = {
    "datacomp-basic": {**BASIC, "languages": ["en"]},
    "none": dict.fromkeys([*BASIC, "duplicate_tolerance"]),
}


# Phase -> why the rows go that it finds.
DROPS = {"settle": "near_duplicate", "meaning": "semantic_duplicate"}


class FilterConfig(NodeConfig):
    """Conditions on what was measured; a bound of null is not asked. Bounds are inclusive.

    A condition on a score that not one row has would let all of them pass: it is refused, unless it came with a preset.
    The defaults are DataComp's basic filter but for its language, which `select` asks before anything is fetched.
    """

    clip: str = encoder("embedded", "open_clip model for caption similarity and image embeddings")
    clip_scores: bool = Field(True, description="compute CLIP similarity and embeddings; false saves the model's time")
    heads: Heads = Field(Heads(), description="scores to compute from CLIP embeddings instead of taking the metadata's")
    precision: Literal["fp32", "bf16", "auto"] = Field("auto", description="arithmetic of CLIP; auto: bf16 on CUDA")
    preset: Literal["datacomp-basic", "none"] | None = operational(
        None, "conditions to start from; a field beside it overrides one, and null takes it away"
    )
    min_side: int | None = Field(BASIC["min_side"], ge=1, description="pixels of the shorter side as stored")
    max_aspect_ratio: float | None = Field(BASIC["max_aspect_ratio"], ge=1, description="longer side / shorter side")
    min_caption_chars: int | None = Field(BASIC["min_caption_chars"], ge=1, description="characters of the caption, at least")
    max_caption_chars: int | None = Field(None, ge=1, description="characters of the caption, at most")
    min_caption_words: int | None = Field(BASIC["min_caption_words"], ge=1, description=WORDS)
    max_caption_words: int | None = Field(None, ge=1, description="counted likewise")
    languages: list[str] | None = Field(None, min_length=1, description="language codes to keep, where the metadata has them")
    min_clip_similarity: float | None = Field(None, description="cosine of image and caption embeddings, computed here")
    min_similarity: float | None = Field(None, description="CLIP similarity that came with the metadata")
    min_aesthetic: float | None = Field(None, description="score of its head, or that came with the metadata")
    max_punsafe: float | None = Field(None, description="score of its head, or that came with the metadata")
    max_pwatermark: float | None = Field(None, description="score of its head, or that came with the metadata")
    keep_null: bool = Field(True, description="a row without a score meets conditions on it; false: it counts as null_COLUMN")
    duplicate_tolerance: int | None = Field(
        12, ge=0, le=32, description="bits of 256 by which perceptual hashes of near duplicates may differ; null keeps duplicates"
    )
    semantic: SemanticConfig | None = Field(
        None,
        description="also drop pictures that show the same by their CLIP embeddings (SemDeDup); install `[semantic]`",
    )
    batch: int = operational(32, "images that CLIP sees at once", ge=1)
    cpus: int | None = operational(
        None, "CPUs of a worker that scores, each of which decodes ahead of it; when not given 1, and up to 8 with a GPU", ge=1
    )
    workers: int | None = operational(None, "workers at most", ge=1)
    skip: tuple[str, ...] = skipped_shards()

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        return PRESETS.get(str(values.get("preset")), {}) | values if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _needs_scores(self) -> FilterConfig:
        if self.min_clip_similarity is not None and not self.clip_scores:
            raise ValueError("min_clip_similarity needs clip_scores: true")
        if self.semantic is not None and (self.duplicate_tolerance is None or not self.clip_scores):
            raise ValueError("semantic needs clip_scores: true and a duplicate_tolerance")
        return self


class Score:
    """Worker of the first phase: everything that can be measured of a shard's rows, whatever is asked of them later."""

    def __init__(self, job: Job):
        self.job = job
        self.config: FilterConfig = job.config

    @cached_property
    def scorer(self) -> Scorer | None:
        """Loaded with the first unit: a head that does not fit then fails the stage at once, and by name."""
        config = self.config
        if not config.clip_scores and not config.heads.named():
            return None
        return Scorer(config.clip, config.clip_scores, config.heads, config.precision)

    @cached_property
    def looking(self) -> Looking:
        return Looking(self.scorer.preprocesses if self.scorer else ())

    def run(self, unit: Unit, out: Output) -> None:
        """A GPU is not waited for from batch to batch: its scores are fetched when all pictures have been handed to it."""
        samples, looks = list[Sample](), list[Look | str]()
        scores: list[dict[str, Any]] = []
        stored = read_shard(self.job.store, unit.payload["path"], unit.rows, unit.digests[0])
        pictures = ahead(stored, self.look, feeders(), 2 * self.config.batch)
        for batch in in_batches(pictures, self.config.batch):
            seen = [(sample.caption, look.seen) for sample, look in batch if isinstance(look, Look)]
            if self.scorer is not None and seen:
                scores.append(self.scorer([views for _, views in seen], [caption for caption, _ in seen]))
            samples += [replace(sample, image=b"") for sample, _ in batch]
            looks += [replace(look, seen=()) if isinstance(look, Look) else look for _, look in batch]
        computed = {name: np.concatenate([made[name].cpu().numpy() for made in scores]) for name in (scores[0] if scores else ())}
        table = self.table(samples, looks, computed)
        write_table(table, out.path("scores.parquet", table.num_rows))
        out.stats.rows_in = table.num_rows

    def look(self, sample: Sample) -> Look | str:
        """What is measured of a sample's picture, or why the row is dropped."""
        try:
            return boxed(self.looking, sample.image)
        except PictureError as reason:
            return str(reason)

    def table(self, samples: list[Sample], found: list[Look | str], computed: dict[str, np.ndarray]) -> pa.Table:
        """A row per sample; what was measured is null where the image cannot be decoded, and `fault` says why it cannot."""
        looks = [look if isinstance(look, Look) else None for look in found]
        columns: dict[str, Any] = {
            duplicates.FAULT: pa.array([look if isinstance(look, str) else None for look in found], pa.string()),
            "key": pa.array([sample.key for sample in samples], pa.string()),
            "caption": pa.array([sample.caption for sample in samples], pa.string()),
            "width": pa.array([look and look.width for look in looks], pa.int32()),
            "height": pa.array([look and look.height for look in looks], pa.int32()),
            "phash": pa.array([look and look.phash for look in looks], pa.binary(HASH_BYTES)),
            "colours": pa.array([look and look.colours for look in looks], pa.binary(COLOUR_BYTES)),
        }
        columns["language"] = pa.array([sample.meta.get("language") for sample in samples], pa.string())
        for score in METADATA_SCORES:
            columns[score] = pa.array([sample.meta.get(score) for sample in samples], pa.float32())
        decoded = [row for row, look in enumerate(looks) if look is not None]
        for name in ("clip_similarity", *self.config.heads.named()):
            values = pa.array(_spread(computed.get(name, ()), decoded, len(samples)), pa.float32())
            # What overflowed in a network is no score, and JSON could not hold it.
            columns[name] = pc.if_else(pc.is_finite(values), values, None)
        embeddings = [row.tobytes() for row in computed.get("clip", ())]
        columns["clip"] = pa.array(_spread(embeddings, decoded, len(samples)), pa.binary())
        return pa.table(columns)


def _spread(values: Iterable[Any], rows: list[int], total: int) -> list[Any]:
    """The values in their rows, null in the others."""
    found: list[Any] = [None] * total
    for row, value in zip(rows, values, strict=False):
        found[row] = value
    return found


class Write:
    """Worker of the last phase: judges the scores and copies the rows that stay."""

    def __init__(self, job: Job):
        self.job = job
        self.config: FilterConfig = job.config

    def run(self, unit: Unit, out: Output) -> None:
        if unit.payload["refusal"]:
            raise StageError(unit.payload["refusal"])
        scores = read_table(self.job, unit.payload["scores"])
        verdict = duplicates.judge(scores, self.config)
        for reason, place in unit.payload["places"].items():
            verdict.drop(reason, duplicates.dropped_rows(self.job, place, scores.num_rows))
        kept = scores.filter(pa.array(verdict.passing)).drop_columns([duplicates.FAULT])
        write_table(kept, out.path(f"{unit.name}.parquet", kept.num_rows))
        out.path(f"{unit.name}.tar", kept.num_rows)
        self.copy(unit, out, {row["key"]: row for row in kept.drop_columns(["phash", "colours", "clip", "caption"]).to_pylist()})
        out.stats.rows_in, out.stats.rows_out = scores.num_rows, kept.num_rows
        for reason, rows_lost in verdict.dropped.items():
            out.stats.drop(reason, rows_lost)

    def copy(self, unit: Unit, out: Output, kept: dict[str, dict[str, Any]]) -> None:
        """The kept samples, image bytes untouched, with what was measured in their JSON."""
        with ShardWriter(out.folder / f"{unit.name}.tar") as tar:
            for sample in read_shard(self.job.store, unit.payload["path"], unit.rows, unit.digests[0]):
                if sample.key in kept:
                    measured = {name: value for name, value in kept[sample.key].items() if name != "key"}
                    tar.add(Sample(sample.key, sample.image, sample.extension, sample.caption, sample.meta | measured))


def _score_units(job: Job, earlier: Records) -> Iterable[Unit]:
    for entry in job.inputs["rows"].files:
        if entry.name.endswith(".tar") and entry.rows:
            yield Unit(entry.name.removesuffix(".tar"), (entry.sha256,), {"path": entry.path}, entry.rows)


def _write_units(job: Job, earlier: Records) -> Iterable[Unit]:
    """Decided by the shard, by its scores and by its own duplicates.

    A refusal is left to the workers: `status` and `gc` plan too. It decides as well, so that none is found done.
    """
    refusal = refusal_of(job, earlier)
    drops = zip(*(duplicates.drops_by_shard(earlier, phase) for phase in DROPS), strict=True)
    for unit, record, found in zip(_score_units(job, earlier), earlier["score"], drops, strict=True):
        (scores,) = record.files
        digests = (*unit.digests, scores.sha256, *(digest for digest, _ in found), *([refusal] if refusal else []))
        places = dict(zip(DROPS.values(), (place for _, place in found), strict=True))
        payload = {**unit.payload, "scores": scores.path, "refusal": refusal, "places": places}
        yield Unit(unit.name, digests, payload, unit.rows)


def unanswered(config: FilterConfig, earlier: Records) -> dict[str, str]:
    """Field -> column of the conditions for which not one row has a value; none where no row can be decoded."""
    counted = [record.notes.get("known") for record in earlier["survey"]]
    # Surveys of before this was counted say nothing.
    known: Counter[str] = sum(map(Counter, counted), Counter()) if None not in counted else Counter()
    if not known["phash"]:
        return {}
    asked = {condition.name: column for condition in conditions(config) for column in condition.columns}
    return {"languages" if name == "language" else name: column for name, column in asked.items() if not known[column]}


def is_presets(config: FilterConfig, field: str) -> bool:
    """Whether a condition came with the preset: nobody wrote it for these rows."""
    return field in (preset := PRESETS.get(str(config.preset), {})) and preset[field] == getattr(config, field)


def refusal_of(job: Job, earlier: Records) -> str:
    """What is wrong with the conditions that the recipe sets, empty when nothing is."""
    lost = {field: column for field, column in unanswered(job.config, earlier).items() if not is_presets(job.config, field)}
    if not lost:
        return ""
    given, fields = job.config.heads.named(), ", ".join(lost)
    heads = [name for name in lost.values() if name in Heads.model_fields]
    fixes = [f"{'check' if name in given else 'set'} heads.{name}.weights" for name in heads]
    return f"{job.node}: no row has a value for {fields}; {' or '.join([*fixes, f'leave {fields} out'])}"


def _score_resources(config: FilterConfig) -> Resources:
    from stages.runner.cluster import gpus_each

    gpus = gpus_each(config.machines) if config.clip_scores or config.heads.named() else 0.0
    return Resources(cpus_each(config.cpus, gpus, config.machines), gpus, config.workers)


CONDITIONS = frozenset(FilterConfig.model_fields) - {"duplicate_tolerance", "semantic"}


class Filter(Stage):
    name = "filter"
    version = 6
    Config = FilterConfig
    phases = (
        Phase(
            "score",
            _score_units,
            Score,
            fields=frozenset({"clip_scores", "heads", "precision"}),
            resources=_score_resources,
            memory=("batch",),
        ),
        *duplicates.PHASES,
        *meaning.PHASES,
        Phase("write", _write_units, Write, fields=CONDITIONS, resources=lambda config: Resources(1.0, 0.0, config.workers)),
    )

    @classmethod
    def check(cls, config: FilterConfig, sources: Mapping[str, str], lists: Mapping[str, Mapping[str, str]]) -> None:
        check_semantic(config)

    @classmethod
    def weights(cls, config: FilterConfig) -> dict[str, str]:
        uses_own = config.clip_scores or any(head.clip is None for head in config.heads.named().values())
        own = {"clip": weights_digest(config.clip, "clip")} if uses_own else {}
        return own | head_digests(config.heads)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        columns = job.inputs["rows"].manifest.columns
        return columns | dict.fromkeys(("clip_similarity", *job.config.heads.named()), "float")

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        """For every score that any row has: its histogram over all rows that came in, and the rows left at some thresholds."""
        for field in unanswered(job.config, records):
            log.warning("%s: no row has a value for the preset's %s, which keeps them all", job.node, field)
        counted = [record.notes["histograms"] for record in records["survey"]]
        joined = {score: join([histograms[score] for histograms in counted]) for score in SCORES}
        return {"scores": {score: histogram_of(score, counts) for score, counts in joined.items() if sum(counts[:-1])}}
