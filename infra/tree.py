"""What lies below a local folder, as columns: millions of files as Python objects would take gigabytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

FILE, FOLDER, LINK, BROKEN, SPECIAL = range(5)
# Size in bytes, and the times of the last change of content and of status in nanoseconds: the second cannot be set back.
STAMP = ("size", "modified", "changed")
TREE = pa.schema([("name", pa.large_string()), ("kind", pa.int8()), *((part, pa.int64()) for part in STAMP)])
# Rows that are Python objects at a time.
SOME = 16384

Row = tuple[str, int, int, int, int]


class Tree:
    """Everything below a folder, at most `depth` deep (None: at any depth). Links to folders are not entered, so that none leads
    round in a circle.

    Attributes:
        parts: what has a name in UTF-8, in no order, as `TREE`.
        strange: (name, kind, bytes) of the rest.
        unreadable: folders that may not be read.
    """

    def __init__(self, root: str, depth: int | None):
        self.strange: list[tuple[str, int, int]] = []
        self.unreadable: list[str] = []
        self.parts: list[pa.RecordBatch] = []
        rows: list[Row] = []
        for row in self._walk(root, depth):
            if not row[0].isascii() and not utf8(row[0]):
                self.strange.append(row[:3])
                continue
            rows.append(row)
            if len(rows) == SOME:
                self.parts.append(batch(rows))
                rows = []
        self.parts.append(batch(rows))

    def _walk(self, root: str, depth: int | None) -> Iterator[Row]:
        waiting = [("", depth)]
        while waiting:
            below, left = waiting.pop()
            try:
                with os.scandir(root + below) as scan:
                    for entry in scan:
                        name = below + entry.name
                        kind, status = look(entry)
                        yield (name, kind, *status)
                        if kind == FOLDER and left != 1:
                            waiting.append((f"{name}/", left and left - 1))
            except PermissionError:
                self.unreadable.append(below)
            except (FileNotFoundError, NotADirectoryError):
                continue


def look(entry: os.DirEntry[str]) -> tuple[int, tuple[int, int, int]]:
    """Kind and stamp of what a folder holds; only a file has the latter."""
    try:
        status = entry.stat()
    except OSError:
        return BROKEN, (0, 0, 0)
    if stat.S_ISREG(status.st_mode):
        return FILE, (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if stat.S_ISDIR(status.st_mode):
        return (LINK if entry.is_symlink() else FOLDER), (0, 0, 0)
    return SPECIAL, (0, 0, 0)


def stamped(root: str, name: str) -> pa.RecordBatch:
    """A file as `TREE`.

    Raises:
        OSError: there is none of that name.
    """
    status = os.stat(root + name)
    return batch([(name, FILE, status.st_size, status.st_mtime_ns, status.st_ctime_ns)])


def batch(rows: Sequence[Sequence[Any]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else ([] for _ in TREE)
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, TREE, strict=True)], schema=TREE)


def release() -> None:
    """Give back what was let go: Arrow keeps it for a while, and with millions of files that is a good part of all memory."""
    pa.default_memory_pool().release_unused()


def utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
