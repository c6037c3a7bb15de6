"""filter: looks at the pixels and the captions of what was downloaded, and keeps the rows worth encoding.

    score   a unit per shard: decode, measure, embed with CLIP, code for near duplicates; depends on no threshold
    write   a unit per shard: the rows that meet the conditions and look like no earlier one, as a WebDataset shard

"Earlier" means a row above it in the same shard or in a shard before, in the order of the input, that meets the conditions; one
that is itself a near duplicate counts too, so that the rule is one of sets. Units need nothing of each other's results, and a
shard that is appended changes nothing for those before it. The default conditions are DataComp's "basic" ones.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from stages.conditions import SCORES, Verdict, columns_of, conditions
from stages.contract import Job, Output, Phase, Records, Resources, Stage, StageConfig, StageError, Unit, UnitRecord, operational
from stages.duplicates import THUMBNAIL_BYTES, Near, thumbnail
from stages.histogram import count, histogram_of, join
from stages.recipe import encoder
from stages.tar import Sample, ShardWriter, read_samples
from unidiffuser.references import weights_digest

TRAVELLING = tuple(score for score in SCORES if score != "clip_similarity")


class FilterConfig(StageConfig):
    """Conditions on what was measured; a bound of null is not asked. Bounds are inclusive."""

    clip: str = encoder("embedded", "open_clip model for caption similarity and image embeddings")
    clip_scores: bool = Field(True, description="compute CLIP similarity and embeddings; false saves the model's time")
    precision: Literal["fp32", "bf16", "auto"] = Field("auto", description="arithmetic of CLIP; auto: bf16 on CUDA")
    min_side: int | None = Field(200, ge=1, description="pixels of the shorter side as stored")
    max_aspect_ratio: float | None = Field(3.0, ge=1, description="longer side / shorter side")
    min_caption_chars: int | None = Field(6, ge=1)
    max_caption_chars: int | None = Field(None, ge=1)
    min_caption_words: int | None = Field(3, ge=1)
    max_caption_words: int | None = Field(None, ge=1)
    min_clip_similarity: float | None = Field(None, description="cosine of image and caption embeddings, computed here")
    min_aesthetic: float | None = Field(None, description="score that came with the metadata")
    max_punsafe: float | None = Field(None, description="score that came with the metadata")
    max_pwatermark: float | None = Field(None, description="score that came with the metadata")
    keep_null: bool = Field(True, description="a row without a score meets conditions on it; false: it counts as null_COLUMN")
    duplicate_tolerance: int | None = Field(
        12, ge=0, le=64, description="levels of 255 by which thumbnails of near duplicates may differ; null keeps duplicates"
    )
    batch: int = operational(32, "images that CLIP sees at once", ge=1)
    workers: int | None = operational(None, "workers at most", ge=1)

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
        self.clip = load_clip(self.config) if self.config.clip_scores else None

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
        out.notes["histograms"] = {score: count(score, table[score]) for score in SCORES}

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
        for score in TRAVELLING:
            columns[score] = pa.array([sample.meta.get(score) for sample in batch], pa.float32())
        similarities: list[float | None] = [None] * len(batch)
        embeddings: list[bytes | None] = [None] * len(batch)
        decoded = [row for row, image in enumerate(images) if image is not None]
        if self.clip is not None and decoded:
            seen = self.clip.image([images[row] for row in decoded]).cpu().numpy()
            read = self.clip.text([batch[row].caption for row in decoded]).cpu().numpy()
            cosine = (seen * read).sum(1) / (np.linalg.norm(seen, axis=1) * np.linalg.norm(read, axis=1))
            for row, similarity, embedding in zip(decoded, cosine, seen, strict=True):
                similarities[row], embeddings[row] = float(similarity), embedding.astype(np.float16).tobytes()
        columns["clip_similarity"] = pa.array(similarities, pa.float32())
        columns["clip"] = pa.array(embeddings, pa.binary())
        return pa.table(columns)


def load_clip(config: FilterConfig) -> Any:
    import torch

    from unidiffuser.encoders import ClipEncoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = config.precision == "bf16" or (config.precision == "auto" and device == "cuda")
    return ClipEncoder.load(config.clip, device, torch.bfloat16 if half else torch.float32)


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
    """Worker of the second phase: judges the scores and copies the rows that stay."""

    def __init__(self, job: Job):
        self.job = job
        self.config: FilterConfig = job.config
        self.conditions = conditions(job.config)
        self.asked = sorted({"width", "height", "caption", "thumbnail"} | columns_of(self.conditions))

    def run(self, unit: Unit, out: Output) -> None:
        with self.job.store.open(unit.payload["scores"]) as file:
            scores = pq.read_table(file)
        verdict = self.judge(scores)
        if self.config.duplicate_tolerance is not None:
            rows = np.flatnonzero(verdict.passing)
            twins = np.zeros(scores.num_rows, dtype=bool)
            twins[rows] = self.near_an_earlier_one(thumbnails_of(scores, verdict), unit.payload["earlier"])
            verdict.drop("near_duplicate", twins)
        kept = scores.filter(pa.array(verdict.passing))
        pq.write_table(kept, out.path(f"{unit.name}.parquet", kept.num_rows), compression="zstd")
        out.path(f"{unit.name}.tar", kept.num_rows)
        self.copy(unit, out, {row["key"]: row for row in kept.drop_columns(["thumbnail", "clip", "caption"]).to_pylist()})
        out.stats.rows_in, out.stats.rows_out = scores.num_rows, kept.num_rows
        for reason, rows_lost in verdict.dropped.items():
            out.stats.drop(reason, rows_lost)

    def judge(self, scores: pa.Table) -> Verdict:
        verdict = Verdict(np.ones(scores.num_rows, dtype=bool))
        verdict.drop("undecodable", scores["thumbnail"].is_null())
        verdict.judge(scores, self.conditions, self.config.keep_null)
        return verdict

    def near_an_earlier_one(self, thumbnails: np.ndarray, earlier: tuple[str, ...]) -> np.ndarray:
        """Mask over this shard's passing rows, given as their thumbnails."""
        assert self.config.duplicate_tolerance is not None
        near = Near(thumbnails, self.config.duplicate_tolerance)
        for path in earlier:
            with self.job.store.open(path) as file:
                others = pq.read_table(file, columns=self.asked)
            near.add(thumbnails_of(others, self.judge(others)))
        return near.resembles

    def copy(self, unit: Unit, out: Output, kept: dict[str, dict[str, Any]]) -> None:
        """The kept samples, image bytes untouched, with what was measured in their JSON."""
        with self.job.store.open(unit.payload["path"]) as file, ShardWriter(out.folder / f"{unit.name}.tar") as tar:
            for sample in read_samples(file):
                if sample.key in kept:
                    measured = {name: value for name, value in kept[sample.key].items() if name != "key"}
                    tar.add(Sample(sample.key, sample.image, sample.extension, sample.caption, sample.meta | measured))


def thumbnails_of(scores: pa.Table, verdict: Verdict) -> np.ndarray:
    """Thumbnails of the passing rows, (rows, THUMBNAIL_BYTES) uint8."""
    found = scores["thumbnail"].filter(pa.array(verdict.passing)).to_pylist()
    return np.frombuffer(b"".join(found), np.uint8).reshape(len(found), THUMBNAIL_BYTES)


def _score_units(job: Job, earlier: Records) -> Iterable[Unit]:
    for entry in job.inputs["rows"].files:
        if entry.name.endswith(".tar") and entry.rows:
            yield Unit(entry.name.removesuffix(".tar"), (entry.sha256,), {"path": entry.path}, entry.rows)


def _write_units(job: Job, earlier: Records) -> Iterable[Unit]:
    """Decided by the shard and, through a running digest, by the scores of all shards before it."""
    before: list[str] = []
    digest = ""
    for unit, record in zip(_score_units(job, earlier), earlier["score"], strict=True):
        (scores,) = record.files
        digest = hashlib.sha256((digest + scores.sha256).encode()).hexdigest()
        payload = {**unit.payload, "scores": scores.path, "earlier": tuple(before)}
        yield Unit(unit.name, (*unit.digests, digest), payload, unit.rows)
        before.append(scores.path)


def _score_resources(config: FilterConfig) -> Resources:
    from stages.pool import gpus_each

    return Resources(1.0, gpus_each() if config.clip_scores else 0.0, config.workers)


class Filter(Stage):
    name = "filter"
    version = 1
    Config = FilterConfig
    phases = (
        Phase("score", _score_units, Score, fields=frozenset({"clip_scores", "precision"}), resources=_score_resources),
        Phase("write", _write_units, Write, resources=lambda config: Resources(1.0, 0.0, config.workers)),
    )

    @classmethod
    def weights(cls, config: FilterConfig) -> dict[str, str]:
        return {"clip": weights_digest(config.clip, "clip")} if config.clip_scores else {}

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        names = {field: kind for field, kind in job.inputs["rows"].manifest.columns.items()}
        return names | {"clip_similarity": "float"}

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        """For every score that any row has: its histogram over the decoded rows, and the rows left at some thresholds."""
        counted = [record.notes["histograms"] for record in records["score"]]
        joined = {score: join([histograms[score] for histograms in counted]) for score in SCORES}
        return {"scores": {score: histogram_of(score, counts) for score, counts in joined.items() if sum(counts[:-1])}}
