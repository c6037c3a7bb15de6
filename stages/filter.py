"""filter: looks at the pixels and the captions of what was downloaded, and keeps the rows worth encoding.

    score   a unit per shard: decode, measure, embed with CLIP, compute the heads' scores; depends on no threshold
    survey, compare, gather   which rows that meet the conditions look like an earlier one: see `stages.duplicates`
    write   a unit per shard: the rows that meet the conditions and are no near duplicates, as a WebDataset shard

Beside each ``SHARD.tar`` lies ``SHARD.parquet`` with what was measured, the CLIP embedding included. A unit of the last phase is
decided by its own shard and its own near duplicates, so a shard that is appended leaves those before it as they are.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from stages import duplicates
from stages.conditions import SCORES
from stages.contract import Job, Output, Phase, Records, Resources, Stage, StageConfig, StageError, Unit, UnitRecord, operational
from stages.heads import Heads, Scorer, head_digests
from stages.histogram import histogram_of, join
from stages.recipe import encoder
from stages.tar import Sample, ShardWriter, read_samples
from stages.thumbnails import THUMBNAIL_BYTES, thumbnail
from unidiffuser.references import weights_digest

TRAVELLING = tuple(score for score in SCORES if score != "clip_similarity")
# DataComp's basic filter (arXiv 2304.14108, appendix): more than 2 words and 5 characters of English, 200 pixels, ratio 3.
BASIC: dict[str, Any] = {"min_side": 200, "max_aspect_ratio": 3.0, "min_caption_chars": 6, "min_caption_words": 3}
PRESETS: dict[str, dict[str, Any]] = {
    "datacomp-basic": {**BASIC, "languages": ["en"]},
    "none": dict.fromkeys([*BASIC, "duplicate_tolerance"]),
}


class FilterConfig(StageConfig):
    """Conditions on what was measured; a bound of null is not asked. Bounds are inclusive.

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
    min_caption_chars: int | None = Field(BASIC["min_caption_chars"], ge=1)
    max_caption_chars: int | None = Field(None, ge=1)
    min_caption_words: int | None = Field(BASIC["min_caption_words"], ge=1)
    max_caption_words: int | None = Field(None, ge=1)
    languages: list[str] | None = Field(None, min_length=1, description="language codes to keep, where the metadata has them")
    min_clip_similarity: float | None = Field(None, description="cosine of image and caption embeddings, computed here")
    min_similarity: float | None = Field(None, description="CLIP similarity that came with the metadata")
    min_aesthetic: float | None = Field(None, description="score of its head, or that came with the metadata")
    max_punsafe: float | None = Field(None, description="score of its head, or that came with the metadata")
    max_pwatermark: float | None = Field(None, description="score of its head, or that came with the metadata")
    keep_null: bool = Field(True, description="a row without a score meets conditions on it; false: it counts as null_COLUMN")
    duplicate_tolerance: int | None = Field(
        12, ge=0, le=64, description="levels of 255 by which thumbnails of near duplicates may differ; null keeps duplicates"
    )
    batch: int = operational(32, "images that CLIP sees at once", ge=1)
    workers: int | None = operational(None, "workers at most", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        return PRESETS.get(str(values.get("preset")), {}) | values if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _needs_scores(self) -> FilterConfig:
        if self.min_clip_similarity is not None and not self.clip_scores:
            raise ValueError("min_clip_similarity needs clip_scores: true")
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

    def run(self, unit: Unit, out: Output) -> None:
        tables = []
        with self.job.store.open(unit.payload["path"]) as file:
            for batch in batches(read_samples(file), self.config.batch):
                tables.append(self.measure(batch))
        found = sum(table.num_rows for table in tables)
        if found != unit.rows:
            # A tar that is cut between two members reads without an error.
            where = self.job.store.url(unit.payload["path"])
            raise StageError(f"{where}: has {found} samples of {unit.rows}; `unidiffuser verify` names what is damaged")
        table = pa.concat_tables(tables)
        pq.write_table(table, out.path("scores.parquet", table.num_rows), compression="zstd")
        out.stats.rows_in = table.num_rows

    def measure(self, batch: list[Sample]) -> pa.Table:
        """A row per sample; width, height, thumbnail and CLIP columns are null where the image cannot be decoded."""
        images = [decode(sample.image) for sample in batch]
        columns: dict[str, Any] = {
            "key": pa.array([sample.key for sample in batch], pa.string()),
            "caption": pa.array([sample.caption for sample in batch], pa.string()),
            "width": pa.array([image and image.width for image in images], pa.int32()),
            "height": pa.array([image and image.height for image in images], pa.int32()),
            "thumbnail": pa.array([image and thumbnail(image) for image in images], pa.binary(THUMBNAIL_BYTES)),
        }
        columns["language"] = pa.array([sample.meta.get("language") for sample in batch], pa.string())
        for score in TRAVELLING:
            columns[score] = pa.array([sample.meta.get(score) for sample in batch], pa.float32())
        decoded = [row for row, image in enumerate(images) if image is not None]
        computed: dict[str, Any] = {}
        if self.scorer is not None and decoded:
            computed = self.scorer([images[row] for row in decoded], [batch[row].caption for row in decoded])
        for name in ("clip_similarity", *self.config.heads.named()):
            columns[name] = pa.array(_spread(computed.get(name, ()), decoded, len(batch)), pa.float32())
        columns["clip"] = pa.array(_spread([row.tobytes() for row in computed.get("clip", ())], decoded, len(batch)), pa.binary())
        return pa.table(columns)


def _spread(values: Iterable[Any], rows: list[int], total: int) -> list[Any]:
    """The values in their rows, null in the others."""
    found: list[Any] = [None] * total
    for row, value in zip(rows, values, strict=False):
        found[row] = value
    return found


def decode(data: bytes) -> Any:
    """An RGB image, or None when the bytes are none or end early."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Image.open(io.BytesIO(data)).convert("RGB")
        # Broken files make Pillow's readers raise nearly anything.
        except Exception:
            return None


def batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class Write:
    """Worker of the last phase: judges the scores and copies the rows that stay."""

    def __init__(self, job: Job):
        self.job = job
        self.config: FilterConfig = job.config

    def run(self, unit: Unit, out: Output) -> None:
        with self.job.store.open(unit.payload["scores"]) as file:
            scores = pq.read_table(file)
        verdict = duplicates.judge(scores, self.config)
        twins = np.zeros(scores.num_rows, dtype=bool)
        twins[duplicates.dropped_rows(self.job, unit.payload)] = True
        verdict.drop("near_duplicate", twins)
        kept = scores.filter(pa.array(verdict.passing))
        pq.write_table(kept, out.path(f"{unit.name}.parquet", kept.num_rows), compression="zstd")
        out.path(f"{unit.name}.tar", kept.num_rows)
        self.copy(unit, out, {row["key"]: row for row in kept.drop_columns(["thumbnail", "clip", "caption"]).to_pylist()})
        out.stats.rows_in, out.stats.rows_out = scores.num_rows, kept.num_rows
        for reason, rows_lost in verdict.dropped.items():
            out.stats.drop(reason, rows_lost)

    def copy(self, unit: Unit, out: Output, kept: dict[str, dict[str, Any]]) -> None:
        """The kept samples, image bytes untouched, with what was measured in their JSON."""
        with self.job.store.open(unit.payload["path"]) as file, ShardWriter(out.folder / f"{unit.name}.tar") as tar:
            for sample in read_samples(file):
                if sample.key in kept:
                    measured = {name: value for name, value in kept[sample.key].items() if name != "key"}
                    tar.add(Sample(sample.key, sample.image, sample.extension, sample.caption, sample.meta | measured))


def _score_units(job: Job, earlier: Records) -> Iterable[Unit]:
    for entry in job.inputs["rows"].files:
        if entry.name.endswith(".tar") and entry.rows:
            yield Unit(entry.name.removesuffix(".tar"), (entry.sha256,), {"path": entry.path}, entry.rows)


def _write_units(job: Job, earlier: Records) -> Iterable[Unit]:
    """Decided by the shard, by its scores and by its own near duplicates."""
    shards = zip(_score_units(job, earlier), earlier["score"], duplicates.drops_by_shard(earlier), strict=True)
    for unit, record, (digest, drops) in shards:
        (scores,) = record.files
        yield Unit(unit.name, (*unit.digests, scores.sha256, digest), {**unit.payload, "scores": scores.path, **drops}, unit.rows)


def _score_resources(config: FilterConfig) -> Resources:
    from stages.pool import gpus_each

    return Resources(1.0, gpus_each() if config.clip_scores or config.heads.named() else 0.0, config.workers)


CONDITIONS = frozenset(FilterConfig.model_fields) - {"duplicate_tolerance"}


class Filter(Stage):
    name = "filter"
    version = 2
    Config = FilterConfig
    phases = (
        Phase("score", _score_units, Score, fields=frozenset({"clip_scores", "heads", "precision"}), resources=_score_resources),
        *duplicates.PHASES,
        Phase("write", _write_units, Write, fields=CONDITIONS, resources=lambda config: Resources(1.0, 0.0, config.workers)),
    )

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
        counted = [record.notes["histograms"] for record in records["survey"]]
        joined = {score: join([histograms[score] for histograms in counted]) for score in SCORES}
        return {"scores": {score: histogram_of(score, counts) for score, counts in joined.items() if sum(counts[:-1])}}
