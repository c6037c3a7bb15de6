"""download: fetches the images of selected rows into WebDataset tars, a unit per shard, with img2dataset's engine.

Beside each ``SHARD.tar`` (the images that came) lies ``SHARD.parquet`` with every row and what became of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from stages.contract import Job, Output, Phase, Records, Resources, Stage, StageConfig, Unit, UnitRecord, operational
from stages.fetch import can_heal
from stages.laion import SCORES
from stages.tar import Sample, ShardWriter

if TYPE_CHECKING:
    from stages.engine import Outcome, ShardSink

# What a row is called when the engine gave it back neither as an image nor as a failure.
LOST = "engine_error"
RESULT = pa.schema(
    [
        ("status", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
    ]
)


class DownloadConfig(StageConfig):
    """How images are fetched and stored; LAION's own settings by default."""

    image_size: int = Field(512, ge=16, description="side that images are resized to, in pixels")
    resize_mode: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = Field(
        "keep_ratio", description="keep_ratio: the shorter side becomes image_size"
    )
    resize_only_if_bigger: bool = Field(True, description="never enlarge")
    skip_reencode: bool = Field(True, description="keep the bytes as fetched where nothing changes the image")
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int = Field(95, ge=0, le=100, description="0 to 100; for png the compression level, 0 to 9")
    min_image_size: int = Field(0, ge=0, description="pixels of the shorter side as fetched")
    max_pixels: int = Field(100_000_000, ge=1, description="width x height as fetched, judged before decoding")
    max_bytes: int = Field(50_000_000, ge=1, description="of one body")
    timeout: float = Field(10.0, gt=0, description="seconds without a byte")
    deadline: float = Field(60.0, gt=0, description="seconds for one URL, retries included")
    retries: int = Field(2, ge=0, description="further tries after server errors, timeouts and broken connections")
    respect_noai: bool = Field(
        True, description="leave out images whose X-Robots-Tag says noai, noimageai, noindex or noimageindex"
    )
    user_agent_token: str | None = Field(None, description="name that sites can address in X-Robots-Tag")
    allow_private: bool = Field(False, description="allow private, loopback and link-local addresses")
    hosts: dict[str, str] = operational({}, "host name -> host:port to connect to in its place (a proxy, a mirror)")
    threads: int = operational(64, "connections of one worker", ge=1, le=1024)
    cpus: float = operational(1.0, "CPUs that one worker takes", gt=0)
    workers: int | None = operational(None, "workers at most", ge=1)

    @model_validator(mode="after")
    def _png_quality(self) -> DownloadConfig:
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError("encode_quality is the compression level for png; expected 0 to 9")
        return self


class Fetcher:
    """Worker: one shard of rows in, one tar and one table of outcomes out."""

    def __init__(self, job: Job):
        import urllib.request

        from stages.engine import download_rows
        from stages.fetch import Limits, WebOpener

        self.job = job
        config: DownloadConfig = job.config
        limits = Limits(
            config.timeout, config.deadline, config.retries, config.max_bytes, config.respect_noai, config.user_agent_token
        )  # fmt: skip
        self.opener = WebOpener(limits, config.hosts, config.allow_private)
        self.install = urllib.request.install_opener
        self.download = download_rows

    def run(self, unit: Unit, out: Output) -> None:
        with self.job.store.open(unit.payload["path"]) as file:
            rows = pq.read_table(file)
        wanted = pa.table({"row": pa.array(range(rows.num_rows), pa.int64()), "url": rows["url"]})
        with TemporaryDirectory(dir=out.folder) as scratch:
            # img2dataset calls urllib.request.urlopen, which asks the process's opener.
            self.install(self.opener)
            sink = self.download(wanted, self.job.config, Path(scratch))
            try:
                outcomes = [sink.outcomes.get(row) for row in range(rows.num_rows)]
                self._write_table(out.path(f"{unit.name}.parquet", rows.num_rows), rows, outcomes)
                self._write_tar(unit, out, rows, outcomes, sink)
            finally:
                sink.file.close()
        out.stats.rows_in = rows.num_rows
        for outcome in outcomes:
            reason = outcome.reason if outcome else LOST
            if reason:
                out.stats.drop(reason)
            else:
                out.stats.rows_out += 1

    @staticmethod
    def _write_table(path: Path, rows: pa.Table, outcomes: list[Outcome | None]) -> None:
        """Every row with its outcome; the sizes that the metadata listed are kept under names of their own."""
        listed = rows.rename_columns([f"listed_{name}" if name in ("width", "height") else name for name in rows.column_names])
        results = {name: [getattr(o, name, None) for o in outcomes] for name in RESULT.names if name != "status"}
        results["status"] = [(o.reason or "success") if o else LOST for o in outcomes]
        for field in RESULT:
            listed = listed.append_column(field, pa.array(results[field.name], field.type))
        pq.write_table(listed, path, compression="zstd")

    def _write_tar(self, unit: Unit, out: Output, rows: pa.Table, outcomes: list[Outcome | None], sink: ShardSink) -> None:
        extension = self.job.config.encode_format
        name = f"{unit.name}.tar"
        with ShardWriter(out.path(name)) as tar:
            for row, values in sorted(enumerate(rows.to_pylist()), key=lambda item: item[1]["key"]):
                outcome = outcomes[row]
                if outcome is not None and not outcome.reason:
                    meta = meta_of(values, outcome)
                    tar.add(Sample(values["key"], sink.image(outcome), extension, values["caption"], meta))
                    out.rows[name] += 1


def meta_of(values: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    """What goes into a sample's JSON: the metadata's columns, without its claims about the size, and what was measured."""
    listed = {name: value for name, value in values.items() if name not in ("key", "caption", "width", "height")}
    return listed | {name: getattr(outcome, name) for name in RESULT.names if name != "status"}


def _units(job: Job, earlier: Records) -> Iterable[Unit]:
    for entry in job.inputs["rows"].files:
        yield Unit(entry.name.removesuffix(".parquet"), (entry.sha256,), {"path": entry.path}, entry.rows)


class Download(Stage):
    name = "download"
    version = 1
    Config = DownloadConfig
    phases = (Phase("download", _units, Fetcher, resources=lambda config: Resources(config.cpus, 0, config.workers)),)

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        """A JPEG of 512 x 512 pixels takes about 50 kB on average; larger ones in proportion."""
        rows = sum(entry.rows for entry in job.inputs["rows"].files)
        return int(rows * 50_000 * (job.config.image_size / 512) ** 2)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        sample = {"key": "string", "caption": "string", "url": "string", "language": "string", "hash": "int64"}
        return (
            sample | dict.fromkeys(SCORES, "float") | {field.name: str(field.type) for field in RESULT if field.name != "status"}
        )

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        """How many of the lost rows another try may bring."""
        dropped: Counter[str] = Counter()
        for record in records["download"]:
            dropped.update(record.stats.dropped)
        return {"can_heal": sum(rows for reason, rows in dropped.items() if can_heal(reason))}
