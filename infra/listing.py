"""What a path, glob or URL from outside means: what exists means itself; what is no data is passed over, counted and said."""

from __future__ import annotations

import functools
import glob
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from infra.queries import place, said
from infra.tree import BROKEN, FILE, FOLDER, LINK, SPECIAL, TREE, Tree, batch, stamped

log = logging.getLogger("infra")

MAGIC = re.compile(r"[*?[]")
# A name a part of which begins with a dot, or is what writers of Parquet leave beside the data.
MARKER = r"_SUCCESS|_temporary|_delta_log|_(common_)?metadata|_(committed|started)_[^/]*|[^/]*_\$folder\$"
HIDING = rf"(^|/)(\.|({MARKER})(/|$))"
# Ending of a pattern: letters and digits that stand for themselves.
ENDING = re.compile(r"\.(\w+)$")
IMAGES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "heic", "heif"})
GONE = (404, 410)

IMAGE = rf"(?i)\.({'|'.join(sorted(IMAGES))})$"

HIDDEN, NAME, UNREADABLE = "hidden files and markers", "names that are not UTF-8", "folders that may not be read"
WORDS = {
    FOLDER: "folders", LINK: "links to folders, which are not entered", BROKEN: "broken links",
    SPECIAL: "neither files nor folders",
}  # fmt: skip


class OutsideError(OSError):
    """A path, glob or URL that cannot be used; one line with the fix. `pattern` is what a person wrote."""

    def __init__(self, pattern: str, why: str):
        super().__init__(f"{pattern}: {why}")
        self.pattern = pattern


class NothingFound(OutsideError, FileNotFoundError):
    """A path, glob or URL that leads to no file."""

    def __init__(self, pattern: str):
        super().__init__(pattern, "no such file; expected a path, glob or URL that exists")


class Files(NamedTuple):
    """Files of one file system, as `infra.tree.TREE` in no order; their names continue the root, which ends in ``/``."""

    fs: Any
    root: str
    table: pa.Table

    def paths(self) -> list[str]:
        """Sorted."""
        return sorted(self.root + name for name in self.table["name"].to_pylist())


class Listing:
    """The files that some patterns mean together, so that what all of them leave out can be told."""

    def __init__(self) -> None:
        self.fresh: set[int] = set()
        self.odd: set[str] = set()
        self.trees: dict[tuple[str, int | None], Tree] = {}
        self.found: list[Files] = []
        # By pattern, file system and paths of images that it leaves out for their ending alone.
        self.beside: dict[str, tuple[Any, list[pa.Array]]] = {}

    def files(self, pattern: str) -> Files:
        """The files that a pattern means.

        Raises:
            NothingFound: there is none.
            OutsideError: a folder by itself, what is no file, or a place that cannot be looked at.
        """
        with readable(pattern):
            fs, path = place(pattern)
        local = isinstance(fs, LocalFileSystem)
        if id(fs) not in self.fresh and not local:
            # A listing that an earlier look has left in memory would hide what has changed since.
            fs.invalidate_cache()
            self.fresh.add(id(fs))
        with readable(pattern):
            if _exists(fs, path, pattern):
                root, name = path[: path.rfind("/") + 1], path[path.rfind("/") + 1 :]
                found = [stamped(root, name) if local else batch([(name, FILE, 0, 0, 0)])]
            else:
                root, rest = _literal_part(fs, path)
                found = list(self._matches(fs, root, rest, pattern))
        files = Files(fs, root, pa.Table.from_batches(found, TREE))
        if not files.table.num_rows:
            raise NothingFound(pattern)
        self.found.append(files)
        return files

    def _matches(self, fs: Any, root: str, rest: str, pattern: str) -> Iterator[pa.RecordBatch]:
        """The files of data that a glob below a folder means."""
        ending = ENDING.search(rest)
        around = ENDING.sub(".*", rest) if ending is not None and ending[1].lower() in IMAGES else _any_case(rest)
        wanted, beside = (re.compile(glob_translate(each)) for each in (_any_case(rest), around))
        odd = Odd(pattern, rest, ending is None)
        if isinstance(fs, LocalFileSystem):
            tree = self._tree(root, None if odd.deep else rest.count("/") + 1)
            parts, odd.names = tree.parts, {UNREADABLE: list(tree.unreadable)} if tree.unreadable else {}
            for name, kind, size in tree.strange:
                if wanted.match(name):
                    odd.put(name, kind, size)
        else:
            parts = [batch(list(_globbed(fs, root, around)))]
        for part in parts:
            data, others = odd.parted(part, wanted)
            images = others.filter(pc.match_substring_regex(others, IMAGE))
            if around != _any_case(rest) and len(images):
                images = images.filter(pa.array([beside.match(name) is not None for name in images.to_pylist()], pa.bool_()))
                self.beside.setdefault(pattern, (fs, []))[1].append(_joined(root, images))
            yield data
        odd.say(root, self.odd)

    def _tree(self, root: str, depth: int | None) -> Tree:
        """Images and captions are two patterns, and one look at each file."""
        if (root, depth) not in self.trees:
            self.trees[root, depth] = Tree(root, depth)
        return self.trees[root, depth]

    def say_left_out(self) -> None:
        """One line for each pattern beside whose images lie others that no pattern takes."""
        for pattern, (fs, parts) in self.beside.items():
            beside = pa.chunked_array(parts, pa.large_string())
            found = [_joined(files.root, files.table["name"]) for files in self.found if files.fs is fs]
            taken = pa.chunked_array([part for paths in found for part in paths.chunks], pa.large_string())
            left = beside.filter(pc.invert(pc.is_in(beside, value_set=taken)))
            endings = pc.utf8_lower(pc.replace_substring_regex(left, r"(?s)^.*\.", ".")).value_counts().to_pylist()
            if endings:
                told = sorted((each["values"], each["counts"]) for each in endings)
                counts = ", ".join(f"{count} {ending}" for ending, count in told)
                own, colons, archive = pattern.partition("::")
                others = " and ".join(f"{ENDING.sub(ending, own)}{colons}{archive}" for ending, _ in told)
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
        self.pattern, self.deep, self.any_ending = pattern, "**" in below, any_ending
        self.depth = below.count("/") + 1
        self.explicit = any(part.startswith((".", "_")) for part in below.split("/"))
        self.names: dict[str, list[str]] = {}

    def parted(self, part: pa.RecordBatch, wanted: re.Pattern[str]) -> tuple[pa.RecordBatch, pa.Array]:
        """The files of data among those that match, and the names of other files that are not hidden; what is odd is put down."""
        names, kinds = part["name"].to_pylist(), part["kind"].to_numpy()
        fits = np.fromiter(map(bool, map(wanted.match, names)), bool, len(names))
        plain = kinds == FILE
        if self.any_ending:
            plain &= part["size"].to_numpy() != 0
        if not self.explicit:
            plain &= ~pc.match_substring_regex(part["name"], HIDING).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero((fits & ~plain) | (kinds == LINK)):
            # A link to a folder through which a pattern might have led is told of whatever its name is.
            if fits[row] or self.deep or names[row].count("/") + 1 != self.depth:
                self.put(names[row], int(kinds[row]), part["size"][row].as_py())
        return part.filter(pa.array(fits & plain)), part["name"].filter(pa.array(plain & ~fits))

    def put(self, name: str, kind: int, size: int) -> None:
        """Put down what is no data."""
        if kind == FOLDER:
            odd = "" if self.deep else WORDS[FOLDER]
        elif self._hidden(name) or (kind == FILE and size == 0 and self.any_ending):
            odd = HIDDEN
        else:
            odd = NAME if kind == FILE else WORDS[kind]
        if odd:
            self.names.setdefault(odd, []).append(name)

    def _hidden(self, name: str) -> bool:
        return not self.explicit and re.search(HIDING, name) is not None

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


def _globbed(fs: Any, root: str, pattern: str) -> Iterator[tuple[str, int, int, int, int]]:
    """What matches below a folder that is not here, as rows of `TREE` without times."""
    base = str(fs._strip_protocol(root)).rstrip("/")
    kinds = {"file": FILE, "directory": FOLDER}
    for path, info in fs.glob(glob.escape(root) + pattern, detail=True).items():
        size = -1 if info.get("size") is None else info["size"]
        yield path[len(base) :].lstrip("/"), kinds.get(info["type"], SPECIAL), size, 0, 0


def _joined(root: str, names: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(pa.scalar(root, pa.large_string()), names, pa.scalar("", pa.large_string()))


def _counted(kind: str, names: list[str]) -> str:
    first = os.fsencode(min(names)).decode(errors="backslashreplace")
    return f"{kind}: {len(names)} ({first}{', ...' if len(names) > 1 else ''})"


@functools.cache
def _say(line: str) -> None:
    """Once a process: a recipe is planned again and again while it runs."""
    log.warning(line)
