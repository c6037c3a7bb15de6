"""encode: filtered images and captions in, Parquet shards of latents out (arXiv 2303.06555, section 6.1 and appendix).

A row holds the autoencoder's moments (so that z is drawn anew each epoch), the CLIP image embedding, the text latent of the
codec, and every score that the row gathered on its way, so that a training stage can tighten a threshold without encoding.

Further captions, `caption.NAME` of the input, stay, and each has its text latents in `text.NAME`, null where a row has none.

A filter that embedded the images with the same CLIP passes its embeddings on (see `passed_on`). It saw the whole image, where
encode sees the square that it cuts out and resizes; CLIP's own centre crop takes the same square. On the little web's images the
two embeddings have a cosine of 0.9997 or more at 256 px and of 0.9999 or more at 512 px. A CLIP that is shown all of an image
(``resize_mode`` squash or longest) saw something else in the filter: its embeddings are computed anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from infra.scratch import scratch_folder
from stages.encode.square import Squared, Squaring
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
from stages.shards.captions import caption_of, column_of_caption, names_of
from stages.shards.feed import ahead, cpus_each, feeders, on_device
from stages.shards.latents import binaries
from stages.shards.scores import SCORES
from stages.shards.tables import open_table, read_table, with_dictionary
from stages.shards.tar import Sample, in_batches, read_shard
from training.told import ShardNotes, columns_of
from unidiffuser.images import PictureError
from unidiffuser.references import Encoders, local_folder, public_name, weights_digest

# Small groups: the training loader shuffles whole groups, and 256 rows read in milliseconds.
ROW_GROUP = 256
# Pixels of a side that are one number of the published model's latents.
PUBLISHED_REDUCTION = 8


class EncodeConfig(NodeConfig):
    size: int = Field(256, ge=32, le=4096, description="side of the square images, in pixels")
    vae: str = encoder("embedded", "AutoencoderKL that makes image latents")
    clip: str = encoder("embedded", "open_clip model for image embeddings")
    text: str = encoder("embedded", "open_clip model whose text tower gives the caption's hidden states")
    precision: Literal["fp32", "bf16", "auto"] = Field("auto", description="arithmetic of the encoders; auto: bf16 on CUDA")
    batch: int = operational(16, "images encoded at once", ge=1)
    cpus: int | None = operational(
        None, "CPUs of one worker, each of which makes pictures ready ahead of it; when not given 1, and up to 8 with a GPU", ge=1
    )
    workers: int | None = operational(None, "encoder processes at most; as many as the cluster holds when not given", ge=1)
    skip: tuple[str, ...] = skipped_shards()

    @property
    def latent_side(self) -> int | None:
        """Side of the latents; None where the autoencoder is a public name other than the published model's.

        Raises:
            FileNotFoundError: there is no autoencoder. StageError: its config.json cannot be read.
        """
        return None if (reduction := self.reduction) is None else self.size // reduction

    @property
    def reduction(self) -> int | None:
        """Pixels of a side that are one number of the latents; None and errors as of `latent_side`."""
        if (folder := local_folder(self.vae, "vae")) is None:
            return PUBLISHED_REDUCTION if public_name(self.vae)[0] == Encoders.vae else None
        try:
            levels = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("block_out_channels")
        except (OSError, ValueError) as error:
            told = " ".join(str(error).split())
            raise StageError(f"vae: {self.vae}/config.json cannot be read: {told}; fetch it again") from None
        # Every level but the last halves the side.
        return None if levels is None else 2 ** (len(levels) - 1)


class Encoder:
    """Loads the encoders once and turns shards into latents."""

    def __init__(self, job: Job):
        import torch

        from unidiffuser.encoders import ClipEncoder, ImageLatents
        from unidiffuser.text_decoder import TextCodec

        config: EncodeConfig = job.config
        self.job = job
        self.further = names_of(job.inputs["rows"].manifest.columns)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        half = config.precision == "bf16" or (config.precision == "auto" and self.device == "cuda")
        dtype = torch.bfloat16 if half else torch.float32
        self.vae = ImageLatents.load(config.vae, self.device, dtype)
        self.vae.latent_shape(config.size)
        self.text = ClipEncoder.load(config.text, self.device, dtype)
        self.clip: ClipEncoder | None = None
        if not passed_on(job):
            self.clip = self.text if config.text == config.clip else ClipEncoder.load(config.clip, self.device, dtype)
        self.squaring = Squaring(config.size, self.clip.preprocess if self.clip else None)
        with scratch_folder() as folder:
            self.codec = TextCodec.load(job.inputs["codec"].fetch(folder)).to(self.device).eval()

    def run(self, unit: Unit, out: Output) -> None:
        name = f"{unit.name}.parquet"
        path = out.path(name)
        passed, told = self.passed(unit), ShardNotes()
        writer: pq.ParquetWriter | None = None
        try:
            pictures = self.pictures(unit, out)
            while group := self.group(islice(pictures, ROW_GROUP), passed):
                table = self.table(*group, out)
                if table is None:
                    continue
                if writer is None:
                    told.facts = json.loads(table.schema.metadata[b"unidiffuser"])
                    writer = pq.ParquetWriter(
                        path, table.schema, compression="none", write_page_checksum=True,
                        use_dictionary=with_dictionary(table.schema),
                    )  # fmt: skip
                writer.write_table(table, row_group_size=ROW_GROUP)
                told.add(table["key"].to_pylist())
                out.stats.rows_out += len(table)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            out.rows.pop(name)
        else:
            out.rows[name] = out.stats.rows_out
            out.notes |= told.notes()

    def passed(self, unit: Unit) -> dict[str, bytes]:
        """Key -> the filter's embedding, (D,) fp16; empty where encode computes them."""
        if "embeddings" not in unit.payload:
            return {}
        table = read_table(self.job, unit.payload["embeddings"], ["key", "clip"])
        return dict(zip(table["key"].to_pylist(), table["clip"].to_pylist(), strict=True))

    def pictures(self, unit: Unit, out: Output) -> Iterator[tuple[Sample, Squared]]:
        """Samples of a shard with their pixels; what is too small or unreadable is counted as dropped."""
        samples = read_shard(self.job.store, unit.payload["path"], unit.rows, unit.digests[0])
        for sample, found in ahead(samples, self.square, feeders(), 2 * self.job.config.batch):
            out.stats.rows_in += 1
            if isinstance(found, str):
                out.stats.drop(found)
            else:
                yield sample, found

    def square(self, sample: Sample) -> Squared | str:
        """What the networks see of a sample's picture, or why the row is dropped."""
        try:
            return boxed(self.squaring, sample.image)
        except PictureError as reason:
            return str(reason)

    def group(
        self, pictures: Iterator[tuple[Sample, Squared]], passed: dict[str, bytes]
    ) -> tuple[list[Sample], dict[str, np.ndarray]] | None:
        """The samples of one row group with their moments, embeddings and text latents, (n, ...) fp16 each; None of no pictures.

        A GPU is not waited for from batch to batch: what it made is fetched when all have been handed to it.
        """
        import torch

        samples: list[Sample] = []
        moments, clips = list[torch.Tensor](), list[torch.Tensor]()
        for batch in in_batches(pictures, self.job.config.batch):
            samples += [sample for sample, _ in batch]
            with torch.inference_mode():
                moments.append(self.vae.moments(on_device([seen.pixels for _, seen in batch], self.device)).half())
                if self.clip is not None:
                    views = [seen.clip for _, seen in batch if seen.clip is not None]
                    clips.append(self.clip.seen(on_device(views, self.device)).half())
        if not samples:
            return None
        text = self.texts([sample.caption for sample in samples])
        clip = torch.cat(clips).cpu().numpy() if clips else np.stack([np.frombuffer(passed[s.key], np.float16) for s in samples])
        return samples, {"moments": torch.cat(moments).cpu().numpy(), "clip": clip, "text": text}

    def table(self, samples: list[Sample], parts: dict[str, np.ndarray], out: Output) -> pa.Table | None:
        """One row group. A row with a number that is not finite is counted as dropped; None if none is left."""
        shapes = {name: list(values.shape[1:]) for name, values in parts.items()}
        facts = {"size": self.job.config.size, "scaling_factor": self.vae.scaling_factor, **shapes}
        facts |= {"captions": self.further} if self.further else {}
        captions = {name: [caption_of(sample, name) for sample in samples] for name in self.further}
        parts |= {f"text.{name}": self.texts(given) for name, given in captions.items()}
        columns: dict[str, Any] = {"key": pa.array([s.key for s in samples]), "caption": pa.array([s.caption for s in samples])}
        columns |= {column_of_caption(name): pa.array(given, pa.string()) for name, given in captions.items()}
        columns |= {name: binaries(values) for name, values in parts.items()}
        for name in self.further:
            known = columns[column_of_caption(name)].is_valid()
            columns[f"text.{name}"] = pc.if_else(known, columns[f"text.{name}"], None)
        columns |= {name: pa.array([s.meta.get(name) for s in samples], pa.float32()) for name in SCORES}
        columns |= {name: pa.array([s.meta[name] for s in samples], pa.int32()) for name in ("width", "height")}
        finite = np.logical_and.reduce([np.isfinite(values).reshape(len(samples), -1).all(1) for values in parts.values()])
        for _ in range(len(samples) - int(finite.sum())):
            out.stats.drop("not_finite")
        if not finite.any():
            return None
        table = pa.table(columns).replace_schema_metadata({"unidiffuser": json.dumps(facts, sort_keys=True)})
        return table if finite.all() else table.filter(pa.array(finite))

    def texts(self, captions: Sequence[str | None]) -> np.ndarray:
        """Text latents of captions, (n, L, d) fp16; 0 for one that is None."""
        import torch

        found = np.zeros((len(captions), self.text.context_length, self.codec.latent_width), np.float16)
        given = [(row, caption) for row, caption in enumerate(captions) if caption is not None]
        made: list[torch.Tensor] = []
        for batch in in_batches(given, self.job.config.batch):
            with torch.inference_mode():
                made.append(self.codec.encode(self.text.tokens([caption for _, caption in batch])).half())
        if made:
            found[[row for row, _ in given]] = torch.cat(made).cpu().numpy()
        return found


def passed_on(job: Job) -> bool:
    """Whether the input holds the embeddings that encode would compute: by the same weights, in the same arithmetic, of a CLIP
    to which an image and its middle square look the same."""
    rows = job.inputs["rows"].manifest
    embedded = rows.stage == "filter" and rows.config["clip_scores"] and rows.config["precision"] == job.config.precision
    if not embedded or rows.sources["clip"] != job.weights["clip"]:
        return False
    from unidiffuser.clip_settings import clip_preprocess

    return clip_preprocess(job.config.clip).takes_middle_square


def plan_shards(job: Job, _: Records) -> Iterator[Unit]:
    """A unit for every WebDataset shard of the input, decided by the table of embeddings too where these are passed on, and by
    the names of further captions."""
    passed, further = passed_on(job), names_of(job.inputs["rows"].manifest.columns)
    digests = {entry.path: entry.sha256 for entry in job.inputs["rows"].files}
    for entry in job.inputs["rows"].files:
        if entry.name.endswith(".tar") and entry.rows:
            unit = Unit(entry.name.removesuffix(".tar"), (entry.sha256, *further), {"path": entry.path}, entry.rows)
            table = f"{entry.path.removesuffix('.tar')}.parquet"
            if passed:
                unit = replace(unit, digests=(*unit.digests, digests[table]), payload={**unit.payload, "embeddings": table})
            yield unit


def encoder_resources(config: EncodeConfig) -> Resources:
    """One worker a GPU where there are GPUs, else one a core."""
    from stages.runner.cluster import gpus_each

    gpus = gpus_each(config.machines)
    return Resources(cpus_each(config.cpus, gpus, config.machines), gpus, config.workers)


class Encode(Stage):
    """Latents in Parquet, one shard for one filtered shard, on a pool of actors."""

    name = "encode"
    version = 5
    Config = EncodeConfig
    whole = frozenset({"codec"})
    phases = (Phase("encode", plan_shards, worker=Encoder, resources=encoder_resources, memory=("batch",)),)

    @classmethod
    def weights(cls, config: EncodeConfig) -> dict[str, str]:
        return {
            "vae": weights_digest(config.vae, "vae"),
            "clip": weights_digest(config.clip, "clip"),
            "text": weights_digest(config.text, "clip"),
        }

    @classmethod
    def check(cls, config: EncodeConfig, sources: Mapping[str, str], lists: Mapping[str, Mapping[str, str]]) -> None:
        # What is left over would be lost at two sides, and pictures come back smaller.
        if (reduction := config.reduction) is not None and config.size % reduction:
            raise StageError(f"size {config.size}: vae {config.vae} needs a multiple of {reduction} pixels")

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        # fp16 moments of an 8 times smaller, 8-channel latent are the largest known; embedding and each caption 10 kB at most.
        rows = job.inputs["rows"].manifest.stats.rows_out
        captions = 1 + len(names_of(job.inputs["rows"].manifest.columns))
        return rows * ((job.config.size // 8) ** 2 * 16 + 10_000 + captions * 10_000)

    @classmethod
    def file_columns(cls, job: Job, records: list[UnitRecord]) -> pa.Table:
        # A unit of which no row is left has no file.
        return columns_of([record.notes for record in records if record.files])

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        for record in records:
            for entry in record.files:
                with open_table(job, entry.path) as file:
                    return {field.name: str(field.type) for field in pq.read_schema(file)}
        return {}
