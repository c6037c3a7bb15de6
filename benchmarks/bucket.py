"""An object store in one file: what a store on ``bucket://FILE`` writes lies in a SQLite database, with the rules of S3.

An object appears whole or not at all, may be put only if there is none, and a listing gives sizes and times. It takes next to no
memory and no server, and outlives the process that filled it.
"""

from __future__ import annotations

import sqlite3
import time
from datetime import UTC, datetime
from typing import Any

import fsspec

SCHEMA = "create table if not exists objects (path text primary key, written real, data blob) without rowid"


class Bucket(fsspec.AbstractFileSystem):
    """See the module; as much of fsspec as `infra.store.Store` uses.
    `refuses` is the part of a path by which objects are known that it does not take now."""

    protocol = "bucket"

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.files: dict[str, sqlite3.Connection] = {}
        self.refuses: str | None = None

    def _split(self, path: str) -> tuple[sqlite3.Connection, str]:
        file, _, key = self._strip_protocol(path).partition(".bucket")
        if file not in self.files:
            database = sqlite3.connect(f"{file}.bucket", isolation_level=None, check_same_thread=False)
            # A machine that loses power takes the simulation with it.
            database.executescript(f"pragma journal_mode = off; pragma synchronous = off; {SCHEMA}")
            self.files[file] = database
        return self.files[file], key.lstrip("/")

    def _one(self, path: str, what: str) -> tuple[Any, ...]:
        database, key = self._split(path)
        found = database.execute(f"select {what} from objects where path = ?", (key,)).fetchone()
        if found is None:
            raise FileNotFoundError(path)
        return tuple(found)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if self.refuses is not None and self.refuses in path:
            raise ConnectionError(path)
        database, key = self._split(path)
        way = "ignore" if mode == "create" else "replace"
        written = database.execute(f"insert or {way} into objects values (?, ?, ?)", (key, time.time(), value))
        if not written.rowcount:
            raise FileExistsError(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        data: bytes = self._one(path, "data")[0]
        return data[start:end]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        size, written = self._one(path, "length(data), written")
        return {"name": path, "type": "file", "size": size, "LastModified": datetime.fromtimestamp(written, UTC)}

    def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **_: Any) -> Any:
        database, key = self._split(path)
        base = self._strip_protocol(path).removesuffix(key)
        rows = database.execute(
            "select path, length(data), written from objects where path >= ? and path < ? order by path", (f"{key}/", f"{key}0")
        )
        found = {
            f"{base}{name}": {"size": size, "LastModified": datetime.fromtimestamp(written, UTC)} for name, size, written in rows
        }
        return found if detail else list(found)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        below = f"{self._strip_protocol(path).rstrip('/')}/"
        names = sorted({below + name.removeprefix(below).split("/")[0] for name in self.find(path)})
        return [{"name": name, "type": "other"} for name in names] if detail else names

    def exists(self, path: str, **_: Any) -> bool:
        return bool(self.find(path)) or self._there(path)

    def _there(self, path: str) -> bool:
        try:
            return bool(self._one(path, "1"))
        except FileNotFoundError:
            return False

    def rm_file(self, path: str) -> None:
        database, key = self._split(path)
        database.execute("delete from objects where path = ?", (key,))


fsspec.register_implementation("bucket", Bucket, clobber=True)
