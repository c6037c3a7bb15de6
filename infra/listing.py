"""What a path, glob or URL from outside means: what exists means itself; what is no data is passed over, counted and said."""

from __future__ import annotations

import functools
import glob
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from infra.queries import place, said

log = logging.getLogger("infra")

MAGIC = re.compile(r"[*?[]")
# What writers of Parquet leave beside the data.
MARKER = re.compile(r"_SUCCESS|_temporary|_delta_log|_(common_)?metadata|_(committed|started)_.*|.*_\$folder\$")
# Ending of a pattern: letters and digits that stand for themselves.
ENDING = re.compile(r"\.(\w+)$")
IMAGES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "heic", "heif"})
GONE = (404, 410)

FOLDER, LINK, BROKEN = "folders", "links to folders, which are not entered", "broken links"
SPECIAL, HIDDEN, NAME = "neither files nor folders", "hidden files and markers", "names that are not UTF-8"
UNREADABLE = "folders that may not be read"


class OutsideError(OSError):
    """A path, glob or URL that cannot be used; one line with the fix. `pattern` is what a person wrote."""

    def __init__(self, pattern: str, why: str):
        super().__init__(f"{pattern}: {why}")
        self.pattern = pattern


class NothingFound(OutsideError, FileNotFoundError):
    """A path, glob or URL that leads to no file."""

    def __init__(self, pattern: str):
        super().__init__(pattern, "no such file; expected a path, glob or URL that exists")


class Listing:
    """The files that some patterns mean together, so that what all of them leave out can be told."""

    def __init__(self) -> None:
        self.fresh: set[int] = set()
        self.found: set[str] = set()
        self.odd: set[str] = set()
        # Pattern -> addresses of images that it leaves out for their ending alone.
        self.beside: dict[str, set[str]] = {}

    def files(self, pattern: str) -> tuple[Any, list[str]]:
        """The file system, and the paths there, sorted.

        Raises:
            NothingFound: there is none.
            OutsideError: a folder by itself, what is no file, or a place that cannot be looked at.
        """
        with readable(pattern):
            fs, path = place(pattern)
        if id(fs) not in self.fresh and not isinstance(fs, LocalFileSystem):
            # A listing that an earlier look has left in memory would hide what has changed since.
            fs.invalidate_cache()
            self.fresh.add(id(fs))
        with readable(pattern):
            paths = [path] if _exists(fs, path, pattern) else self._matches(fs, path, pattern)
        if not paths:
            raise NothingFound(pattern)
        self.found.update(map(fs.unstrip_protocol, paths))
        return fs, paths

    def _matches(self, fs: Any, path: str, pattern: str) -> list[str]:
        root, rest = _literal_part(fs, path)
        ending = ENDING.search(rest)
        images = ending is not None and ending[1].lower() in IMAGES
        wanted = re.compile(glob_translate(_any_case(rest)))
        matches, odd = [], Odd(pattern, rest, ending is None)
        for name, kind, size in _entries(fs, root, ENDING.sub(".*", rest) if images else _any_case(rest), odd):
            address = fs.unstrip_protocol(f"{root}{name}")
            if kind != LINK and not wanted.match(name):
                if kind == "file" and not odd.hidden(name) and _utf8(name) and PurePosixPath(name).suffix[1:].lower() in IMAGES:
                    self.beside.setdefault(pattern, set()).add(address)
            elif odd.is_data(name, kind, size):
                matches.append(f"{root}{name}")
        odd.say(root, self.odd)
        return sorted(matches)

    def say_left_out(self) -> None:
        """One line for each pattern beside whose images lie others that no pattern takes."""
        for pattern, images in self.beside.items():
            endings = Counter(PurePosixPath(address).suffix.lower() for address in images - self.found)
            if endings:
                counts = ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
                own, colons, archive = pattern.partition("::")
                others = " and ".join(f"{ENDING.sub(ending, own)}{colons}{archive}" for ending in sorted(endings))
                _say(f"{pattern}: leaves out other images that lie there: {counts}; to take them too, add {others}")


class Odd:
    """What matches a pattern and is no data: names by kind.

    Args:
        pattern: as a person wrote it.
        below: the part of it that is a glob. Without ``**`` a folder that matches is left out, instead of being looked into
            anyway; a name in it that begins with a dot or an underscore asks for what is hidden.
        any_ending: whether the pattern names no ending, so that an empty file is rather a marker than damaged data.
    """

    def __init__(self, pattern: str, below: str, any_ending: bool):
        self.pattern, self.flat, self.any_ending = pattern, "**" not in below, any_ending
        self.explicit = any(part.startswith((".", "_")) for part in below.split("/"))
        self.names: dict[str, list[str]] = {}

    def put(self, kind: str, name: str) -> None:
        self.names.setdefault(kind, []).append(name)

    def hidden(self, name: str) -> bool:
        parts = () if self.explicit else name.split("/")
        return any(part.startswith(".") or MARKER.fullmatch(part) for part in parts)

    def is_data(self, name: str, kind: str, size: int) -> bool:
        """Whether this is a file of data; else it is put down."""
        if kind == "directory":
            odd = FOLDER if self.flat else None
        elif self.hidden(name) or (kind == "file" and size == 0 and self.any_ending):
            odd = HIDDEN
        elif kind == "file":
            odd = None if _utf8(name) else NAME
        else:
            odd = SPECIAL if kind == "other" else kind
        if odd:
            self.put(odd, name)
        return kind == "file" and not odd

    def say(self, root: str, said: set[str]) -> None:
        """One line about all of it, without what another pattern has met before."""
        kinds = {kind: [name for name in names if root + name not in said] for kind, names in self.names.items()}
        said.update(root + name for names in kinds.values() for name in names)
        counts = [_counted(kind, names) for kind, names in sorted(kinds.items()) if names]
        if counts:
            _say(f"{self.pattern}: passed over {'; '.join(counts)}")


def _exists(fs: Any, path: str, pattern: str) -> bool:
    """Whether the path means itself: a name may hold what a glob is made of."""
    try:
        kind = fs.info(path)["type"]
    except (OSError, ValueError) as error:
        # In a web address ``?`` begins the query, where any character may stand for itself.
        if MAGIC.search(path.split("?")[0] if _is_web(fs) else path):
            return False
        raise _refused(pattern, error) from None
    if kind == "directory":
        own, colons, archive = pattern.partition("::")
        some, all_ = (f"{own.rstrip('/')}/{files}{colons}{archive}" for files in ("*.parquet", "**/*.jpg"))
        raise OutsideError(pattern, f"a folder; name its files, as {some} or, at any depth, {all_} does")
    if kind != "file":
        raise OutsideError(pattern, "neither a file nor a folder; name a file")
    return True


def _is_web(fs: Any) -> bool:
    """Whether it is fsspec's file system of web addresses, without importing that and aiohttp with it."""
    return "http" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


@contextmanager
def readable(pattern: str) -> Iterator[None]:
    """Puts what goes wrong with the files of a pattern into a line.

    Raises:
        OutsideError: what it was.
    """
    try:
        yield
    except OutsideError:
        raise
    # Every file system and every archive has errors of its own.
    except Exception as error:
        raise _refused(pattern, error) from None


def _refused(pattern: str, error: Exception) -> OutsideError:
    """Why a path could not be looked at. fsspec calls all that a web server answers, and silence too, a missing file."""
    cause = error.__cause__ or error
    status = getattr(cause, "status", None)
    file = getattr(cause, "filename", None)
    which = f"{file}: " if file and file != pattern else ""
    if status in GONE or (isinstance(cause, FileNotFoundError | NotADirectoryError) and not which):
        return NothingFound(pattern)
    if status is not None:
        return OutsideError(pattern, f"the server answers {status}; expected 200")
    why = getattr(cause, "strerror", None) or " ".join(str(cause).split()) or type(cause).__name__
    return OutsideError(pattern, said(f"{which}cannot be read: {why}"))


def _literal_part(fs: Any, path: str) -> tuple[str, str]:
    """(folder with ``/`` behind it, glob below it): as much of a pattern as exists under just this name is no glob."""
    parts = path.split("/")
    web = _is_web(fs)
    count = 0
    while count < len(parts) - 1:
        if MAGIC.search(parts[count]) and (web or not fs.exists("/".join(parts[: count + 1]))):
            break
        count += 1
    root = "/".join(parts[:count])
    return root + "/" * bool(count), "/".join(parts[count:])


def _any_case(pattern: str) -> str:
    """The pattern with an ending that matches in capitals too: cameras write ``.JPG``."""
    return ENDING.sub(lambda ending: "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in ending[0]), pattern)


def _entries(fs: Any, root: str, pattern: str, odd: Odd) -> Iterator[tuple[str, str, int]]:
    """(name below the root, kind, bytes) of everything that matches; kinds are fsspec's, or those of what is odd."""
    if isinstance(fs, LocalFileSystem):
        matches = re.compile(glob_translate(pattern))
        depth = None if "**" in pattern else pattern.count("/") + 1
        for name, entry in _walk(root, "", depth, odd):
            if matches.match(name):
                yield name, *_kind(entry)
            elif entry.is_symlink() and name.count("/") + 1 != depth and _kind(entry)[0] == LINK:
                yield name, LINK, 0
        return
    base = str(fs._strip_protocol(root)).rstrip("/")
    for path, info in fs.glob(glob.escape(root) + pattern, detail=True).items():
        yield path[len(base) :].lstrip("/"), info["type"], -1 if info.get("size") is None else info["size"]


def _walk(root: str, below: str, depth: int | None, odd: Odd) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything below a local folder, by name. Links to folders are not entered, so that none leads round in a circle."""
    try:
        with os.scandir(root + below) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except PermissionError:
        odd.put(UNREADABLE, below)
        return
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        name = below + entry.name
        yield name, entry
        if depth != 1 and entry.is_dir(follow_symlinks=False):
            yield from _walk(root, f"{name}/", depth and depth - 1, odd)


def _kind(entry: os.DirEntry[str]) -> tuple[str, int]:
    try:
        status = entry.stat()
    except OSError:
        return BROKEN, 0
    if stat.S_ISDIR(status.st_mode):
        return LINK if entry.is_symlink() else "directory", 0
    return ("file", status.st_size) if stat.S_ISREG(status.st_mode) else (SPECIAL, 0)


def _utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _counted(kind: str, names: list[str]) -> str:
    first = os.fsencode(names[0]).decode(errors="backslashreplace")
    return f"{kind}: {len(names)} ({first}{', ...' if len(names) > 1 else ''})"


@functools.cache
def _say(line: str) -> None:
    """Once a process: a recipe is planned again and again while it runs."""
    log.warning(line)
