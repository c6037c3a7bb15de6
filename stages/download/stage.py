"""download: fetches the images of selected rows into WebDataset tars, a unit per shard, with img2dataset's engine.

Beside each ``SHARD.tar`` (the images that came) lies ``SHARD.parquet`` with every row and what became of it. With an input
``parent``, an earlier download of the same rows, only the rows whose failure can heal are fetched again; shards without
such rows are the parent's own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from infra.dataset import VERIFY, FileEntry
from stages.download import outage
from stages.download.fetch import can_heal
from stages.download.politeness import Hosts, spread
from stages.download.proxy import ENVIRONMENT, Proxies
from stages.runner.attempts import LEAST_LIMIT
from stages.runner.contract import (
    Job,
    Output,
    Phase,
    Records,
    Resources,
    SetAside,
    Stage,
    StageError,
    Unit,
    UnitRecord,
    operational,
)
from stages.runner.skipping import skipped_shards
from stages.shards.captions import names_of, schema_of
from stages.shards.images import MEASURED, RESULT, ImageConfig, Outcome
from stages.shards.scores import METADATA_SCORES
from stages.shards.tables import read_table, write_table
from stages.shards.tar import Sample, ShardWriter, read_samples, whole

if TYPE_CHECKING:
    from stages.download.engine import ShardSink

log = logging.getLogger("stages")

# Shards that a worker has at once, of which all but one wait for their last hosts. Waiting takes threads, and next to no CPU.
SHARDS_AT_ONCE = 8
# What a row is called when the engine gave it back neither as an image nor as a failure.
LOST = "engine_error"
MISMATCH = "hash_mismatch"
# Columns by which metadata may list the digest of an image's bytes, the stronger first. (LAION's `hash` is of URL and text.)
DIGESTS = ("sha256", "md5")
# Columns of the metadata that the results need the names of.
RENAMED = ("width", "height", *DIGESTS)


class DownloadConfig(ImageConfig):
    """How images are fetched, beside how they are stored."""

    timeout: float = Field(10.0, gt=0, description="seconds without a byte")
    deadline: float = Field(60.0, gt=0, description="seconds for one URL, retries included")
    shard_deadline: float = Field(
        3600.0, gt=0, description="seconds for one shard, all tries included; rows not reached by then can be retried"
    )
    retries: int = Field(2, ge=0, description="further tries after server errors, timeouts and broken connections")
    host_failures: int = Field(
        16, ge=0, description="attempts that a host lets end in silence in a row until a worker leaves it alone; 0 never does"
    )
    respect_noai: bool = Field(
        True, description="leave out images whose X-Robots-Tag says noai, noimageai, noindex, noimageindex or none"
    )
    user_agent_token: str | None = Field(None, description="name that sites can address in X-Robots-Tag")
    on_hash_mismatch: Literal["keep", "drop"] = Field(
        "drop", description="what to do with bytes that differ from the metadata's sha256 or md5, where it has one"
    )
    allow_private: bool = Field(False, description="allow private, loopback and link-local addresses")
    hosts: dict[str, str] = operational({}, "host name -> host:port to connect to in its place (a mirror)")
    proxy: str = operational(
        ENVIRONMENT,
        "http://host:port of the HTTP proxy that downloads go through; environment: as http_proxy, https_proxy, all_proxy and "
        "no_proxy say; none: no proxy",
    )
    threads: int = operational(64, "connections of one worker", ge=1, le=1024)
    host_connections: int = operational(8, "connections of one worker to one host; a host sees this times the workers", ge=1)
    cpus: float = operational(1.0, "CPUs that one worker takes", gt=0)
    workers: int | None = operational(None, "workers at most", ge=1)
    skip: tuple[str, ...] = skipped_shards()

    @field_validator("proxy")
    @classmethod
    def _is_a_proxy(cls, value: str) -> str:
        Proxies(value)
        if "@" in value:
            raise ValueError("a password in a recipe is shown with it; set http_proxy where the workers run, and leave this out")
        return value


class Fetcher:
    """Worker: one shard of rows in, one tar and one table of outcomes out.

    While the last rows of a shard wait for hosts that are slow, another shard may begin, in a thread of its own.
    """

    def __init__(self, job: Job):
        import urllib.request

        from stages.download.engine import ShardSink, download_rows
        from stages.download.fetch import Limits, WebOpener
        from stages.download.network import Guard
        from stages.shards.picture import ImageResizer

        self.job = job
        self.config: DownloadConfig = job.config
        config = self.config
        limits = Limits(
            config.timeout, config.deadline, config.retries, config.max_bytes, config.respect_noai, config.user_agent_token
        )  # fmt: skip
        self.guard = Guard(config.hosts, config.allow_private, proxies=Proxies(config.proxy))
        self.hosts = Hosts(config.host_connections, config.host_failures)
        # img2dataset calls urllib.request.urlopen, which asks the process's opener.
        urllib.request.install_opener(WebOpener(limits, self.guard, self.hosts))
        self.download = download_rows
        self.sink = lambda spool, with_md5: ShardSink(spool, ImageResizer(config, with_md5))
        self.usual = outage.Usual()
        # Held by the shard that has rows which have not begun.
        self.beginning = threading.Lock()

    def run(self, unit: Unit, out: Output) -> None:
        rows = read_table(self.job, unit.payload["path"])
        kept = final_outcomes(read_table(self.job, unit.payload["table"])) if "table" in unit.payload else {}
        tried = [row for row in range(rows.num_rows) if row not in kept]
        with TemporaryDirectory(dir=out.folder) as scratch:
            sink = self.sink(Path(scratch, "images"), rows["md5"].null_count < rows.num_rows)
            try:
                self._settle(unit, out, rows["url"].to_pylist(), kept, sink)
                fetched = self._compared(rows, tried, sink)
                outcomes = [kept.get(row) or fetched[row] for row in range(rows.num_rows)]
                self._write_table(out.path(f"{unit.name}.parquet", rows.num_rows), rows, outcomes)
                self._write_tar(unit, out, rows, outcomes, kept, sink)
            finally:
                sink.file.close()
        out.stats.rows_in = rows.num_rows
        for outcome in outcomes:
            if outcome.reason:
                out.stats.drop(outcome.reason)
            else:
                out.stats.rows_out += 1
        out.notes["hash_mismatch"] = sum(outcome.hash_matches is False for outcome in outcomes)
        if "table" in unit.payload:
            out.notes |= {"retried": len(tried), "healed": sum(not fetched[row].reason for row in tried)}

    def _settle(self, unit: Unit, out: Output, urls: list[str], kept: dict[int, Outcome], sink: ShardSink) -> None:
        """Fetch what is not kept, and after a pause what failed, as long as that looks like an outage.

        Raises:
            SetAside: it still does, and it was not the servers that refused.
        """
        wanted = [row for row in range(len(urls)) if row not in kept]
        end, tries = None, 0
        for pause in (*outage.PAUSES, None):
            end, tries = self._fetch(wanted, urls, sink, out, end), tries + 1
            wanted = [row for row in wanted if (sink.outcomes.get(row) or Outcome(LOST)).reason]
            found = kept | sink.outcomes
            tally = outage.Tally.of((url, (found.get(row) or Outcome(LOST)).reason) for row, url in enumerate(urls))
            alarm = self.usual.alarm(tally)
            if alarm is None or pause is None or time.monotonic() + pause >= end:
                break
            log.warning("%s: download %s is tried again in %.0f s: %s", self.job.node, unit.name, pause, alarm)
            time.sleep(pause)
            self.guard.names.forget()
            self.hosts.forgive()
        if alarm and not self.usual.is_refusal(tally):
            raise SetAside(f"{alarm}, in {tries} tries; is it this machine's network, resolver or proxy that fails?")
        if alarm:
            log.warning("%s: download %s is kept, for it is servers that refuse: %s", self.job.node, unit.name, alarm)
        self.usual.add(tally)

    def _fetch(self, wanted: list[int], urls: list[str], sink: ShardSink, out: Output, end: float | None) -> float:
        """Fetch some rows; those of other shards wait until all of these have begun.

        Args:
            end: moment at which the shard must be over; None: `shard_deadline` after its turn has come.

        Returns:
            that moment.
        """
        order = spread([urls[row] for row in wanted])
        table = pa.table({"row": pa.array([wanted[i] for i in order], pa.int64()), "url": [urls[wanted[i]] for i in order]})
        with TemporaryDirectory(dir=out.folder) as scratch, ExitStack() as begun:
            begun.callback(out.give_room)
            begun.enter_context(self.beginning)
            self.hosts.next_shard()
            end = end or time.monotonic() + self.config.shard_deadline
            self.download(table, self.config, Path(scratch), sink, end, begun.close)
            return end

    def _compared(self, rows: pa.Table, tried: list[int], sink: ShardSink) -> dict[int, Outcome]:
        """The outcomes of the rows that were tried, compared with the digests that the metadata lists."""
        columns = {name: rows[name].to_pylist() for name in DIGESTS}
        compared = {}
        for row in tried:
            outcome = sink.outcomes.get(row) or Outcome(LOST)
            listed = next(((name, column[row]) for name, column in columns.items() if column[row]), None)
            if listed and not outcome.reason:
                matches = getattr(outcome, listed[0]) == listed[1].strip().lower()
                drop = not matches and self.config.on_hash_mismatch == "drop"
                outcome = replace(outcome, reason=MISMATCH if drop else "", hash_matches=matches)
            compared[row] = outcome
        return compared

    @staticmethod
    def _write_table(path: Path, rows: pa.Table, outcomes: list[Outcome]) -> None:
        """Every row with its outcome; sizes and digests that the metadata listed are kept under names of their own."""
        table = rows.rename_columns([f"listed_{name}" if name in RENAMED else name for name in rows.column_names])
        results: dict[str, list[Any]] = {"status": [outcome.reason or "success" for outcome in outcomes]}
        results |= {name: [getattr(outcome, name) for outcome in outcomes] for name in (*MEASURED, "hash_matches")}
        for field in (*RESULT, pa.field("hash_matches", pa.bool_())):
            table = table.append_column(field, pa.array(results[field.name], field.type))
        write_table(table, path)

    def _write_tar(
        self, unit: Unit, out: Output, rows: pa.Table, outcomes: list[Outcome], kept: dict[int, Outcome], sink: ShardSink
    ) -> None:
        extension = self.config.encode_format
        name = f"{unit.name}.tar"
        with self._kept_samples(unit) as samples, ShardWriter(out.path(name)) as tar:
            for row, values in sorted(enumerate(rows.to_pylist()), key=lambda item: item[1]["key"]):
                if outcomes[row].reason:
                    continue
                if row in kept:
                    # Both tars are sorted by key, and every image of the earlier one is kept.
                    sample = next(samples, None)
                    if sample is None or sample.key != values["key"]:
                        where = self.job.store.url(unit.payload["tar"])
                        raise StageError(f"{where}: lacks {values['key']}; {VERIFY}")
                    tar.add(sample)
                else:
                    image, meta = sink.image(outcomes[row]), meta_of(values, outcomes[row])
                    tar.add(Sample(values["key"], image, extension, values["caption"], meta))
                out.rows[name] += 1

    @contextmanager
    def _kept_samples(self, unit: Unit) -> Iterator[Iterator[Sample]]:
        if "tar" not in unit.payload:
            yield iter(())
            return
        with whole(self.job.store, unit.payload["tar"], unit.payload["sha256"]) as file:
            yield read_samples(file, self.job.store.url(unit.payload["tar"]))


def final_outcomes(table: pa.Table) -> dict[int, Outcome]:
    """Row number -> outcome, of the rows that another try cannot change."""
    found = {}
    for row, values in enumerate(table.select([*RESULT.names, "hash_matches"]).to_pylist()):
        if not can_heal(status := values.pop("status")):
            found[row] = Outcome("" if status == "success" else status, **values)
    return found


def meta_of(values: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    """What goes into a sample's JSON: the metadata's columns, without its claims about the image, and what was measured."""
    listed = {name: value for name, value in values.items() if name not in ("key", "caption", *RENAMED)}
    return listed | outcome.measured()


def _units(job: Job, earlier: Records) -> Iterable[Unit]:
    for note in Proxies(job.config.proxy).notes():
        log.warning("%s: %s", job.node, note)
    shards = job.inputs["rows"].files
    parent = job.inputs.get("parent")
    before = [list(files) for _, files in groupby(parent.files, key=lambda entry: entry.unit)] if parent else []
    for number, entry in enumerate(shards):
        unit = Unit(entry.name.removesuffix(".parquet"), (entry.sha256,), {"path": entry.path}, entry.rows)
        # An earlier download of the same rows has the same shards in the same order.
        yield _retry(job, unit, *before[number]) if before else unit


def _retry(job: Job, unit: Unit, table: FileEntry, tar: FileEntry) -> Unit:
    """The unit that fetches again what can heal, or the parent's own where nothing can."""
    record = job.unit_done(table.unit)
    if record is not None and not any(can_heal(reason) for reason in record.stats.dropped):
        return replace(unit, shared=table.unit)
    payload = {**unit.payload, "table": table.path, "tar": tar.path, "sha256": tar.sha256}
    return replace(unit, digests=(*unit.digests, table.sha256, tar.sha256), payload=payload)


def _resources(config: DownloadConfig) -> Resources:
    return Resources(config.cpus, 0, config.workers)


def _longest(config: DownloadConfig) -> float:
    """Seconds that a shard may take: where slow hosts have much of it, its own deadline ends it, and what came is written.

    Before its turn comes it may wait for another that is tried again, as long as for that one's deadline.
    """
    return 2 * config.shard_deadline + LEAST_LIMIT


class Download(Stage):
    name = "download"
    version = 5
    can_heal = True
    Config = DownloadConfig
    phases = (
        Phase("download", _units, Fetcher, resources=_resources, at_once=SHARDS_AT_ONCE, least_limit=_longest),
    )  # fmt: skip

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        """A JPEG of 512 x 512 pixels takes about 50 kB on average; larger ones in proportion."""
        rows = sum(entry.rows for entry in job.inputs["rows"].files)
        return int(rows * 50_000 * (job.config.image_size / 512) ** 2)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        sample = {"key": "string", "caption": "string", "url": "string", "language": "string", "hash": "int64"}
        return (
            sample
            | schema_of(names_of(job.inputs["rows"].manifest.columns))
            | dict.fromkeys(METADATA_SCORES, "float")
            | {field.name: str(field.type) for field in RESULT if field.name != "status"}
        )

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        """How many of the lost rows another try may bring, how many this one brought, and bytes that were not as listed."""
        dropped: Counter[str] = Counter()
        for record in records["download"]:
            dropped.update(record.stats.dropped)
        facts = {"can_heal": sum(rows for reason, rows in dropped.items() if can_heal(reason))}
        facts["hash_mismatch"] = sum(record.notes["hash_mismatch"] for record in records["download"])
        if parent := job.inputs.get("parent"):
            shared = {entry.unit for entry in parent.files}
            own = [record for record in records["download"] if record.key not in shared]
            facts |= {name: sum(record.notes.get(name, 0) for record in own) for name in ("retried", "healed")}
        return facts
