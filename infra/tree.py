"""What lies below a local folder, as columns: millions of files as Python objects would take gigabytes."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

FILE, FOLDER, LINK, BROKEN, SPECIAL = range(5)
# Size in bytes, and the times of the last change of content and of status in nanoseconds: the second cannot be set back.
STAMP = ("size", "modified", "changed")
TREE = pa.schema([("name", pa.large_string()), ("kind", pa.int8()), *((part, pa.int64()) for part in STAMP)])
# Rows that are Python objects at a time.
SOME = 16384

Stamp = tuple[int, int, int]


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
        rows = Rows()
        waiting = [("", depth)]
        while waiting:
            below, left = waiting.pop()
            try:
                with os.scandir(root + below) as scan:
                    for entry in scan:
                        name = below + entry.name
                        kind, stamp = look(entry)
                        if kind == FOLDER and left != 1:
                            waiting.append((f"{name}/", left and left - 1))
                        if name.isascii() or utf8(name):
                            rows.add(name, kind, stamp)
                        else:
                            self.strange.append((name, kind, stamp[0]))
            except PermissionError:
                self.unreadable.append(below)
            except (FileNotFoundError, NotADirectoryError):
                continue
        self.parts = rows.parts()


class Rows:
    """Rows of `TREE`, added one by one to columns: a walk that made tuples of them first took a fifth longer."""

    def __init__(self) -> None:
        self._full: list[pa.RecordBatch] = []
        self._begin()

    def _begin(self) -> None:
        self._names: list[str] = []
        self._kinds, self._stamps = bytearray(), array("q")

    def add(self, name: str, kind: int, stamp: Stamp) -> None:
        self._names.append(name)
        self._kinds.append(kind)
        self._stamps.extend(stamp)
        if len(self._names) == SOME:
            self._end()

    def _end(self) -> None:
        stamps = np.frombuffer(self._stamps, np.int64).reshape(-1, len(STAMP))
        columns = (self._names, np.frombuffer(self._kinds, np.int8), *stamps.T.copy())
        self._full.append(_batch(columns))
        self._begin()

    def parts(self) -> list[pa.RecordBatch]:
        """All of them; at least one batch."""
        self._end()
        return self._full


def look(entry: os.DirEntry[str]) -> tuple[int, Stamp]:
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
    return _batch(zip(*rows, strict=True) if rows else ([] for _ in TREE))


def _batch(columns: Iterable[Any]) -> pa.RecordBatch:
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
