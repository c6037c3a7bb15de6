"""sha256 of local files, each read once as long as its size and times stay.

A machine remembers them a folder at a time, which a pattern names literally:

    .state/digests/FOLDER.arrow    name below the folder, stamp and sha256, sorted by name; FOLDER is a digest of its path
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.hashed import Answer, hashed, hashed_apart
from infra.listing import Files, readable
from infra.sources import SHA256, Sources, bytes_of, once
from infra.store import Store, StoreError
from infra.tree import SOME, STAMP, release

log = logging.getLogger("infra")

MEMORY = pa.schema([("name", pa.large_string()), *((part, pa.int64()) for part in STAMP), ("sha256", SHA256)])
# Bytes that one process has read in a second or so, beyond which others are started; and what opening a file costs, in bytes.
BYTES_HERE, OPENING = 2**29, 2**16
# Bytes in one piece of work, pieces that a process has ahead of it, and bytes that take long enough to say so.
BYTES_TOGETHER, AHEAD, BYTES_SAID = 2**28, 2, 2**34


def local_digests(found: dict[str, Files], folder: Path) -> Mapping[str, str]:
    """Path -> sha256.

    Args:
        found: by pattern, its files, of which those are let go that are no longer needed.
        folder: where digests are remembered; not where the store has no state yet, for whoever only asks makes none.

    Raises:
        OutsideError: a file cannot be read.
    """
    tables = []
    for root in list(dict.fromkeys(each.root for each in found.values())):
        here = {pattern: found.pop(pattern).table for pattern in list(found) if found[pattern].root == root}
        tables.append(Memory(root, folder).digests(here))
    known = Sources(once(tables, "address")) if tables else {}
    release()
    return known


class Memory:
    """What a machine remembers of one folder."""

    def __init__(self, root: str, folder: Path):
        self.root, self.folder = root, folder
        self.path = folder / f"{hashlib.sha256(root.encode()).hexdigest()[:24]}.arrow"

    def digests(self, found: dict[str, pa.Table]) -> pa.Table:
        """`address` and `digest` of files; what is not known is read and remembered, as far as that got."""
        patterns = list(found)
        parts = [
            table.append_column("pattern", pa.repeat(pa.scalar(number, pa.int32()), table.num_rows))
            for number, table in enumerate(found.values())
        ]
        found.clear()
        files = pa.concat_tables(parts)
        parts.clear()
        # Columns are not brought into the order of the names, which would be copies of them; each is let go when it is copied.
        pattern, stamps = files["pattern"].to_numpy(), np.empty((len(STAMP), files.num_rows), np.int64)
        for number, part in enumerate(STAMP):
            stamps[number] = files[part]
        column = files["name"]
        del files
        names = column.combine_chunks()
        del column
        release()
        order = pc.array_sort_indices(names).to_numpy()
        digests, known = self._recall(names, stamps, order)
        unknown = order[~known[order]]
        try:
            for rows, some in self._read(names, stamps[0], unknown):
                if isinstance(some, OSError):
                    with readable(patterns[pattern[rows[0]]]):
                        raise some
                digests[rows], known[rows] = some, True
        finally:
            if known[unknown].any():
                self._keep(names, stamps, digests, known)
        del stamps, pattern
        # Sorted first and then shared: two copies of them beside the addresses would be the most that a plan holds.
        digests = digests[order]
        root, nothing = (pa.scalar(text, pa.large_string()) for text in (self.root, ""))
        tables = []
        for start in range(0, max(len(order), 1), SOME):
            piece = slice(start, start + SOME)
            addresses = pc.binary_join_element_wise(root, names.take(pa.array(order[piece])), nothing)
            tables.append(pa.table({"address": addresses, "digest": _column(digests[piece])}))
        return pa.concat_tables(tables)

    def _recall(self, names: pa.Array, stamps: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Digests (files, 32) as bytes, and which of them (files,) are known; `order` is that of the names."""
        digests, known = np.zeros((len(names), SHA256.byte_width), np.uint8), np.zeros(len(names), bool)
        for batch in self._batches():
            first, last = batch["name"][0].as_py(), batch["name"][-1].as_py()
            low = bisect_left(order, first, key=lambda row: names[row].as_py())
            high = bisect_right(order, last, key=lambda row: names[row].as_py())
            rows = order[low:high]
            at = pc.index_in(names.take(pa.array(rows)), value_set=batch["name"]).fill_null(-1).to_numpy()
            rows, at = rows[at >= 0], at[at >= 0]
            same = (np.stack([batch[part].to_numpy()[at] for part in STAMP]) == stamps[:, rows]).all(axis=0)
            digests[rows[same]], known[rows[same]] = bytes_of(batch["sha256"])[at[same]], True
        return digests, known

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """What is remembered; nothing where that is damaged, for it can be read again."""
        with suppress(FileNotFoundError, pa.ArrowInvalid), pa.OSFile(str(self.path)) as file, pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)

    def _read(self, names: pa.Array, sizes: np.ndarray, unknown: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray | OSError]]:
        """Rows and their digests (rows, 32), piece by piece, or one row and why it cannot be read."""
        whole = int(sizes[unknown].sum()) + OPENING * len(unknown)
        if whole > BYTES_SAID:
            log.warning("%s: reading %d files, %.1f GB, to know their content; once", self.root, len(unknown), whole / 1e9)
        many = whole > BYTES_HERE
        processes = len(os.sched_getaffinity(0)) if many else 1
        with ThreadPoolExecutor(processes) as pool:
            waiting: deque[tuple[np.ndarray, Future[Answer]]] = deque()
            try:
                for rows in (*_pieces(unknown, sizes), *[None] * AHEAD * processes):
                    if rows is not None:
                        paths = [self.root + name for name in names.take(pa.array(rows)).to_pylist()]
                        waiting.append((rows, pool.submit(hashed_apart if many else hashed, paths)))
                    if waiting and (rows is None or len(waiting) >= AHEAD * processes):
                        of, future = waiting.popleft()
                        found, refused = future.result()
                        if refused is not None:
                            yield of[refused[0] : refused[0] + 1], refused[1]
                        yield of, np.frombuffer(bytes.fromhex("".join(found)), np.uint8).reshape(len(of), -1)
            finally:
                pool.shutdown(cancel_futures=True)

    def _keep(self, names: pa.Array, stamps: np.ndarray, digests: np.ndarray, known: np.ndarray) -> None:
        """Remember what is known now, beside what was known of other files."""
        if not self.folder.parent.exists():
            return
        fresh = pa.table([names, *map(pa.array, stamps), _column(digests)], schema=MEMORY).filter(pa.array(known))
        before = pa.Table.from_batches(self._batches(), MEMORY)
        before = before.filter(pc.invert(pc.is_in(before["name"], value_set=names)))
        with suppress(OSError, StoreError):
            buffer = io.BytesIO()
            with pa.ipc.new_file(buffer, MEMORY) as writer:
                writer.write_table(pa.concat_tables([before, fresh]).sort_by("name").combine_chunks(), SOME)
            Store(str(self.folder)).write(self.path.name, buffer.getvalue())


def _pieces(rows: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Rows that are read together: so many small files, or few large ones."""
    ends = np.cumsum(sizes[rows] + OPENING)
    start = 0
    while start < len(rows):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BYTES_TOGETHER, "right")))
        yield rows[start:stop]
        start = stop


def _column(digests: np.ndarray) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(SHA256, len(digests), [None, pa.py_buffer(digests)])
