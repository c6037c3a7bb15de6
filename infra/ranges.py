"""A file of any file system that reads just the bytes that it is asked for, a request each.

fsspec's own files read ahead, or look up their size first. Parquet says exactly what it wants.
"""

from __future__ import annotations

import io

import fsspec


class RangeFile(io.RawIOBase):
    """A binary file for reading that is no connection: it holds its place and nothing else.

    Args:
        system, path: where it lies.
        size: its bytes, where they are known; else they are asked for.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """

    def __init__(self, system: fsspec.AbstractFileSystem, path: str, size: int | None = None) -> None:
        self._system, self._path, self._place = system, path, 0
        self.bytes = int(system.info(path)["size"] if size is None else size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.bytes}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        end = self.bytes if size is None or size < 0 else min(self._place + size, self.bytes)
        if end <= self._place:
            return b""
        data: bytes = self._system.cat_file(self._path, start=self._place, end=end)
        self._place += len(data)
        return data
