"""img2dataset's engine, one shard a call: its thread pool and downloader between a table of rows and a tar.

Its own writers put samples down in the order in which they arrive, and its resizer takes pictures for others than people see.
`ShardSink` and `ImageResizer` stand in those two places.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from stages.shards.images import Outcome
from stages.shards.picture import ImageResizer

REASON = re.compile(r"[a-z0-9_]+")


class ShardSink:
    """Takes samples in the order in which they arrive: images into a spool file, outcomes into memory, by row number.

    A row that is tried again gets another outcome.
    """

    def __init__(self, spool: Path, resizer: ImageResizer):
        self.file: BinaryIO = open(spool, "w+b")  # noqa: SIM115
        self.resizer = resizer
        self.outcomes: dict[int, Outcome] = {}
        self.failure: Exception | None = None
        self.awaited, self.threads, self.all_begun = 0, 0, lambda: None

    def await_rows(self, rows: int, threads: int, all_begun: Callable[[], None]) -> None:
        """So many are to come, from so many threads; calls `all_begun` when no more are left than the threads have."""
        self.awaited, self.threads, self.all_begun = rows, threads, all_begun
        if rows <= threads:
            all_begun()

    def resized(self, stream: BytesIO, *boxes: Any) -> tuple[Any, ...]:
        """img2dataset's resizer interface."""
        try:
            return self.resizer(stream, *boxes)
        except Exception as error:
            # The engine would count the row as lost: what befalls this machine, and no picture, must not look like a broken one.
            self.failure = self.failure or error
            raise

    def write(self, image: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """img2dataset's writer interface."""
        row = meta["row"]
        self.awaited -= 1
        if self.awaited <= self.threads:
            self.all_begun()
        if image is None:
            self.outcomes[row] = Outcome(reason_of(meta["error_message"], meta["url"]))
            return
        sizes = {name: meta[name] for name in ("width", "height", "original_width", "original_height")}
        try:
            # The engine resizes and writes a sample before it turns to the next.
            digests = {"sha256": meta["sha256"], "md5": self.resizer.md5}
            self.outcomes[row] = Outcome("", **sizes, **digests, offset=self.spool(image), length=len(image))
        except OSError as error:
            # The engine would print this and go on without the row: a full disk must not look like a dead link.
            self.failure = self.failure or error

    def spool(self, image: bytes) -> int:
        """Where the image begins in the spool."""
        offset = self.file.tell()
        self.file.write(image)
        return offset

    def image(self, outcome: Outcome) -> bytes:
        self.file.seek(outcome.offset)
        return self.file.read(outcome.length)

    def close(self) -> None:
        """img2dataset is done writing; the spool stays open for reading."""
        self.file.flush()


def reason_of(message: str, url: str) -> str:
    """The engine's message where it is a reason already; else `bad_url` for what it could not even make a request of."""
    if REASON.fullmatch(message):
        return message
    try:
        urllib.request.Request(url)
    except ValueError:
        return "bad_url"
    return "engine_error"


def download_rows(rows: pa.Table, config: Any, scratch: Path, sink: ShardSink, end: float, all_begun: Callable[[], None]) -> None:
    """Fetch and resize images through the opener that is installed in `urllib.request`.

    Args:
        rows: columns `row` (its number) and `url`, in the order in which they are tried.
        config: a `DownloadConfig`.
        scratch: folder for the engine's own files.
        sink: takes the outcomes; a row that the engine lost has none.
        end: moment (`time.monotonic`) at which the shard must be over.
        all_begun: called, perhaps often, when no row is left that has not begun.

    Raises:
        Exception: an image could not be put down, or no process be had that decodes it.
    """
    from stages.download.downloader import Downloader

    table = scratch / "rows.arrow"
    with pa.OSFile(str(table), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)
    sink.await_rows(rows.num_rows, config.threads, all_begun)
    engine = Downloader(
        sample_writer_class=lambda *_: sink,
        resizer=sink.resized,
        thread_count=config.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(scratch),
        column_list=["row", "url"],
        timeout=end,
        number_sample_per_shard=max(2, rows.num_rows),
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=config.encode_format,
        # The installed opener retries, and knows what can heal. It also reads X-Robots-Tag.
        retries=0,
        user_agent_token=config.user_agent_token,
        disallowed_header_directives=None,
    )
    engine.download_shard((0, str(table)))
    if sink.failure is not None:
        raise sink.failure
