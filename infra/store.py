"""A store: one folder on any fsspec file system, in which a file appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from infra import s3
from infra.lease import leased
from infra.queries import of_nobody, said
from infra.ranges import RangeFile

# Small files that an object store is asked for at once; the answers are held in memory.
READ_AT_ONCE = 1000


class StoreError(Exception):
    """A store that cannot be read or written; the message names the path and the fix."""


class NotThere(StoreError):
    """A store, a dataset or a deployment that a person has named and that is not there; the message names what comes nearest."""


def sha256_of(path: str | Path) -> str:
    """Hex sha256 of a local file, read in 1 MiB pieces.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stays_below(path: str) -> bool:
    """Whether a path that somebody else has written, with ``/`` between its parts, names a file below the folder it is put to."""
    return "\0" not in path and not {"", ".", ".."} & set(path.split("/"))


def _read_local(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


class Writing:
    """A file of a store while it is written, with the size and the digest of what was written so far."""

    def __init__(self, file: Any) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class Store:
    """Reads and writes below one root, given as a local path or an fsspec URL (``s3://bucket/prefix``).

    All paths are relative to the root, with ``/`` between the parts. Instances pickle: workers open their own connection.

    Raises:
        StoreError: no file system of this kind is known, or its package is not installed.

    Examples:
        >>> import tempfile
        >>> store = Store(tempfile.mkdtemp())
        >>> store.write("a/b.json", b"{}")
        >>> store.read("a/b.json")
        b'{}'
    """

    def __init__(self, root: str):
        try:
            # Nothing that a process has listed may hide from it what others write.
            fs, path = fsspec.core.url_to_fs(of_nobody(root), use_listings_cache=False)
        except ImportError as error:
            package = getattr(error.__cause__ or error, "name", None) or "the package of its file system"
            raise StoreError(f"{root}: {package} is not installed, which such a store needs; pip install {package}") from error
        except ValueError as error:
            raise StoreError(f"{said(root)}: {error}; expected a folder or an fsspec URL such as s3://bucket/prefix") from error
        self.local = isinstance(fs, LocalFileSystem)
        self.root = str(Path(path).resolve()) if self.local else root.rstrip("/")
        self.fs = fs
        self._is_s3 = "s3" in fs.protocol
        # Else s3fs asks for the size first, and for a listing where there is no such file.
        self._whole = {"max_concurrency": 1} if self._is_s3 else {}
        self._base = self.root if self.local else path.rstrip("/")

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.root,)

    def url(self, path: str) -> str:
        """The address that fsspec, pyarrow or a person can open."""
        return f"{self.root}/{path}"

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}"

    def check_there(self) -> None:
        """For commands that only read: they make no store.

        Raises:
            NotThere: nothing lies at the root.
        """
        if not self.is_there():
            raise NotThere(f"{self.root}: there is no store; --store or UNIDIFFUSER_STORE names another")

    def is_there(self) -> bool:
        """Whether anything lies at the root."""
        return bool(self.fs.exists(self._base))

    def exists(self, path: str) -> bool:
        return bool(self.fs.exists(self._full(path)))

    def open(self, path: str) -> BinaryIO:
        """A seekable binary file, to be read from one end to the other: on an object store 50 MB ahead.

        Raises:
            StoreError: there is no such file.
        """
        try:
            return self.fs.open(self._full(path), "rb")
        except FileNotFoundError:
            raise self._missing(path) from None

    def ranges(self, path: str) -> BinaryIO:
        """The same for a reader that knows which bytes it wants: nothing is read ahead.

        Raises:
            StoreError: there is no such file.
        """
        if self.local:
            return self.open(path)
        try:
            return cast(BinaryIO, RangeFile(self.fs, self._full(path)))
        except FileNotFoundError:
            raise self._missing(path) from None

    def read(self, path: str) -> bytes:
        """A whole file.

        Raises:
            StoreError: there is no such file.
        """
        try:
            return cast(bytes, self.fs.cat_file(self._full(path), **self._whole))
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(path) from None

    def _missing(self, path: str) -> StoreError:
        return StoreError(f"{self.url(path)}: no such file; `unidiffuser verify` tells what else is missing")

    def read_json(self, path: str) -> Any:
        """Parsed JSON, or None when there is no such file.

        Raises:
            StoreError: the file is not JSON.
        """
        try:
            data = self.fs.cat_file(self._full(path), **self._whole)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return json.loads(data)
        except ValueError:
            raise StoreError(f"{self.url(path)}: not JSON; delete the file and run again") from None

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        """The contents of many small files in order, None for one that is not there; asked for many at a time."""
        for start in range(0, len(paths), READ_AT_ONCE):
            some = [self._full(path) for path in paths[start : start + READ_AT_ONCE]]
            if self.local:
                yield from map(_read_local, some)
                continue
            found = self.fs.cat(some, on_error="return", **self._whole)
            for path in some:
                data = found[self.fs._strip_protocol(path)]
                if isinstance(data, Exception) and not isinstance(data, FileNotFoundError | NotADirectoryError):
                    raise data
                yield None if isinstance(data, Exception) else data

    def list(self, path: str) -> list[str]:
        """Names directly below a folder, sorted; empty when there is none."""
        try:
            found = self.fs.ls(self._full(path), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)

    def modified(self, path: str) -> datetime:
        """When a file was written."""
        return self.fs.modified(self._full(path))

    def walk(self, path: str) -> Iterator[tuple[str, int, datetime]]:
        """Path, bytes and time of writing of every file below a folder; on an object store, one listing."""
        base = str(self.fs._strip_protocol(self._base))
        for name, size, moment in s3.listed(self.fs, self._full(path)) if self._is_s3 else self._found(path):
            yield name.removeprefix(base).lstrip("/"), size, moment

    def _found(self, path: str) -> Iterator[tuple[str, int, datetime]]:
        for name, info in self.fs.find(self._full(path), detail=True).items():
            moment = next(info[key] for key in ("mtime", "LastModified", "updated", "last_modified", "created") if key in info)
            if not isinstance(moment, datetime):
                moment = datetime.fromtimestamp(moment, UTC) if isinstance(moment, float) else datetime.fromisoformat(moment)
            yield name, info["size"], moment

    def write(self, path: str, data: bytes, once: bool = False) -> bool:
        """Write a small file atomically: after a crash it is there whole or not at all.

        Args:
            once: only if there is none.

        Returns:
            Whether it was written.
        """
        if self.local:
            target = Path(self._full(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.{uuid4().hex}.part")
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return self._rename(part, target, once)
        # One PUT: an object store shows an object only once it is complete.
        try:
            self.fs.pipe_file(self._full(path), data, mode="create" if once else "overwrite")
        except FileExistsError:
            return False
        return True

    def write_json(self, path: str, value: Any, once: bool = False) -> bool:
        return self.write(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode(), once)

    @contextmanager
    def writing(self, path: str) -> Iterator[Writing]:
        """Write a file of any size piece by piece; it appears whole when the block ends, and not at all when that raises.

        To an object store it goes in parts while it is written. It is not read back: its size is compared.

        Raises:
            StoreError: what arrived has another size.
        """
        if self.local:
            target = Path(self._full(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.{uuid4().hex}.part")
            try:
                with open(part, "wb") as file:
                    writing = Writing(file)
                    yield writing
                    file.flush()
                    os.fsync(file.fileno())
                self._rename(part, target)
            finally:
                with suppress(FileNotFoundError):
                    part.unlink()
        else:
            sent = self.fs.open(self._full(path), "wb", block_size=s3.PART)
            writing = Writing(sent)
            try:
                yield writing
            except BaseException:
                sent.discard()
                raise
            sent.close()
        if (found := self.fs.info(self._full(path))["size"]) != writing.size:
            raise StoreError(f"{self.url(path)}: {found:,} bytes arrived of {writing.size:,}; check the disk and run again")

    def publish(self, source: str | Path, path: str) -> tuple[int, str]:
        """Move a finished local file into the store and return (bytes, sha256).

        The digest is taken from the source first and compared with what arrived, so that a bad disk or a cut connection
        cannot commit a damaged file: by S3 itself before it takes the file, elsewhere by reading it back.

        Raises:
            StoreError: what was read back differs from what was written.
            OSError: S3 found that it differs.
        """
        digest, size = sha256_of(source), os.path.getsize(source)
        if self.local:
            target = Path(self._full(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.{uuid4().hex}.part")
            shutil.copyfile(source, part)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            self._check(sha256_of(part), digest, path)
            self._rename(part, target)
        else:
            if self._is_s3:
                compared = s3.put(self.fs, source, self._full(path), digest)
            else:
                self.fs.put_file(str(source), self._full(path))
                compared = False
            if not compared:
                with self.fs.open(self._full(path), "rb") as stored:
                    self._check(hashlib.file_digest(stored, "sha256").hexdigest(), digest, path)
        return size, digest

    def _check(self, found: str, expected: str, path: str) -> None:
        if found != expected:
            raise StoreError(f"{self.url(path)}: read back {found[:12]}, wrote {expected[:12]}; check the disk and run again")

    @staticmethod
    def _rename(part: Path, target: Path, once: bool = False) -> bool:
        """The moment at which a local file appears, `once` only if there is none; whether it did. The folder is flushed so that
        the name survives a power cut."""
        try:
            if once:
                os.link(part, target)
            else:
                os.replace(part, target)
        except FileExistsError:
            return False
        except OSError as error:
            if not once or error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP):
                raise
            # Without hard links two at the same moment cannot be told apart.
            return not target.exists() and Store._rename(part, target)
        finally:
            if once:
                part.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return True

    def fetch(self, path: str, target: str | Path) -> Path:
        """Copy a stored file to a local path and return that path."""
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self._full(path), str(target))
        return Path(target)

    @contextmanager
    def claimed(self, name: str) -> Iterator[None]:
        """Hold a name against all others that work on this store; waits for it. The claim of a process that dies is gone.

        A byte of one file stands for a name, so nothing is left behind. File systems without locks do nothing. On an object store
        it is a lease, which ends a minute after its holder died.
        """
        if not self.local:
            with leased(self, name):
                yield
            return
        path = Path(self._full(".state/claims"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            byte = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
            # The lock of this open file: those of `lockf` are the process's, and any thread that closes the file loses them all.
            lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            try:
                fcntl.fcntl(file, fcntl.F_OFD_SETLKW, lock)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                    raise
            yield

    def remove(self, path: str) -> None:
        """Delete a file or a whole folder; nothing happens when it is not there."""
        if self.exists(path):
            self.fs.rm(self._full(path), recursive=True)

    def discard(self, path: str) -> None:
        """Delete one file; nothing happens when it is not there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._full(path))

    def free_bytes(self) -> int | None:
        """Room left on a local disk, in bytes; None for object stores, which have no such number."""
        if not self.local:
            return None
        folder = Path(self.root)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free
