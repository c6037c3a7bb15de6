"""Lists of what may or must not be downloaded (opt-outs, Re-LAION's safe rows), joined with the picked rows range by range.

A list is a Parquet file with a column of URLs, hashes or domains, or a text file with one of them a line. An entry
``example.com`` covers ``images.example.com`` too; ``.example.com`` and ``*.example.com`` mean the same. What can be no host's
domain, such as a URL or another pattern, is refused with its place: it would allow or deny nothing, and nobody would notice.

    lists   a unit per list file: its entries as keys
    match   a unit per kind of entry and range of keys: which picked rows of which file are on the lists
    admit   a unit per metadata file: its picked rows without those that are denied or not allowed

Memory of a worker: the entries of one range (about 60 MB), two bytes a row of one metadata file, and bounded pieces of the rest.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.queries import file_name
from stages.runner.contract import Job, Output, Records, StageError, Unit, UnitRecord
from stages.select.keys import Keys, KeyWriter, RowSets, add_notes, mixed, ranges, read_keys, text_keys
from stages.select.laion import BATCH
from stages.shards.outside import cast, check_column, first, is_parquet, open_parquet, readable, text_lines
from training.names import NAMES

KIND_TYPES = {"url": pa.string(), "hash": pa.int64(), "domain": pa.string()}
KINDS = tuple(KIND_TYPES)
ROLES = ("allow", "deny")
INTEGER = re.compile(r"[+-]?\d+")
# In the regular expressions that Python and Arrow share. Of ASCII letters, digits, hyphens and underscores; no broken UTF-8.
LABEL = r"[^\x00-,./:-@\[-^`{-\x7f" + "\ufffd]+"
WILDCARD = r"^\*?\."
DOMAIN = rf"(?:\*?\.)?{LABEL}(?:\.{LABEL})+\.?"
PLAIN = r"^[a-z0-9._-]*$"
EXPECTED = {"auto": "url, hash or domain"}
LINES = 65_536


def hash_keys(column: pa.Array | pa.ChunkedArray) -> Keys:
    """Keys of int64 values without nulls."""
    return mixed(column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy())


def domain_keys(urls: pa.Array) -> tuple[Keys, np.ndarray]:
    """Keys of every domain that a URL's host belongs to (``a.b.org`` to itself and ``b.org``), and which URL each is of."""
    names = ascii_hosts(pc.struct_field(pc.extract_regex(urls, r"^[^:]+://(?:[^/?#]*@)?(?P<host>[^/?#:]*)"), "host"))
    places = np.arange(len(urls))
    keys: list[Keys] = []
    of: list[np.ndarray] = []
    while len(names):
        # A name without a dot (com, localhost) is no domain that a list could mean, unless it is the whole host.
        named = pc.fill_null(pc.greater(pc.binary_length(names), 0), False)
        if keys:
            named = pc.and_(named, pc.match_substring(names, "."))
        names, places = names.filter(named), places[np.asarray(named)]
        keys.append(text_keys(names))
        of.append(places)
        names = pc.replace_substring_regex(names, r"^[^.]*\.?", "")
    return np.concatenate(keys) if keys else np.zeros(0, np.uint64), np.concatenate(of) if of else np.zeros(0, np.int64)


def ascii_hosts(names: pa.Array) -> pa.Array:
    """Host names as they are compared: in lower case, without a dot at the end, in the ASCII form that download looks up."""
    names = pc.utf8_rtrim(pc.utf8_lower(names), ".")
    odd = pc.invert(pc.fill_null(pc.match_substring_regex(names, PLAIN), True))
    if pc.any(odd).as_py():
        names = pc.replace_with_mask(names, odd, pa.array([_looked_up(name) for name in names.filter(odd).to_pylist()]))
    return names


def _looked_up(name: str) -> str:
    """As download looks a name up: tabs and line breaks are no part of a URL, and what is no ASCII goes through IDNA 2003."""
    name = re.sub(r"[\t\r\n]", "", name)
    try:
        return name.encode("idna").decode("ascii").rstrip(".")
    except UnicodeError:
        return name


def _registered(name: str) -> str:
    """The ASCII form of IDNA 2008, by which domains are registered: another one where a name has a letter such as ß."""
    labels = unicodedata.normalize("NFKC", name.rstrip(".")).split(".")
    return ".".join(label if label.isascii() else f"xn--{label.encode('punycode').decode('ascii')}" for label in labels)


class ReadList:
    """Worker of the first phase."""

    def __init__(self, job: Job):
        self.config = job.config

    def run(self, unit: Unit, out: Output) -> None:
        address, role = unit.payload["address"], unit.payload["role"]
        by = getattr(self.config, f"{role}_by")
        read = self._parquet if is_parquet(address) else self._text
        with ExitStack() as stack:
            writers = {kind: stack.enter_context(KeyWriter(out.path(f"{kind}.parquet"))) for kind in KINDS}
            for kind, keys in read(address, by):
                writers[kind].add(keys, np.zeros(len(keys), dtype=np.int64))
        for kind, writer in writers.items():
            out.rows[f"{kind}.parquet"] = writer.count

    def _parquet(self, address: str, by: str) -> Iterator[tuple[str, Keys]]:
        with open_parquet(address) as parquet:
            kind, column = _column(self.config, address, parquet.schema_arrow, by)
            row = 0
            with readable(address):
                for batch in parquet.iter_batches(BATCH, columns=[column]):
                    values = self._entries(address, row, kind, *cast(batch.column(0), KIND_TYPES[kind]))
                    row += batch.num_rows
                    yield kind, _entry_keys(kind, values)

    @staticmethod
    def _entries(address: str, start: int, kind: str, values: pa.Array, unread: pa.Array) -> pa.Array:
        """What a part of a file lists; null and empty cells list nothing. `start` is the row of the first."""
        if (bad := first(unread)) is not None:
            raise StageError(f"{address}, row {start + bad}: not a value that can be read as a {kind}")
        if kind == "domain":
            _check_domains(address, start, values)
        return values.drop_null()

    def _text(self, address: str, by: str) -> Iterator[tuple[str, Keys]]:
        entries: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for number, line in enumerate(text_lines(address), start=1):
            if not (entry := line.strip()) or entry.startswith("#"):
                continue
            kind = _kind(entry)
            if kind is None or by not in ("auto", kind):
                raise StageError(f"{address}, line {number}: {entry[:80]!r} is no {EXPECTED.get(by, by)}")
            entries[kind].append(entry)
            if number % LINES == 0:
                yield from _drained(entries)
        yield from _drained(entries)


def _column(config: Any, address: str, schema: pa.Schema, by: str) -> tuple[str, str]:
    """The kind of the entries, and the column that holds them: the first of url, hash and domain unless told."""
    for kind in KINDS if by == "auto" else (by,):
        own = config.columns.get(kind)
        for name in (own,) if own else NAMES.get(kind, ("domain", "DOMAIN")):
            if name in schema.names:
                check_column(address, schema, name, KIND_TYPES[kind])
                return kind, name
    raise StageError(f"{address}: columns found: {', '.join(schema.names)}; a list needs {EXPECTED.get(by, by)}")


def check_lists(config: Any, lists: Mapping[str, Mapping[str, str]]) -> None:
    """Raises StageError: a list in Parquet cannot be read, or has no column of what it should list."""
    for role, files in lists.items():
        for address in filter(is_parquet, files):
            with open_parquet(address) as parquet:
                _column(config, address, parquet.schema_arrow, getattr(config, f"{role}_by"))


def _kind(entry: str) -> str | None:
    if "://" in entry:
        return "url"
    if INTEGER.fullmatch(entry):
        return "hash"
    return "domain" if re.fullmatch(DOMAIN, entry) else None


def _check_domains(address: str, start: int, values: pa.Array) -> None:
    """Raises StageError: a value is no domain (null and empty ones list nothing); `start` is the first value's row."""
    if (bad := pc.index(pc.match_substring_regex(values, f"^(?:{DOMAIN})?$"), False).as_py()) >= 0:
        found = repr(values[bad].as_py()[:80])
        raise StageError(f"{address}, row {start + bad}: {found} is no domain; write its name alone, such as a.example")


def _drained(entries: dict[str, list[str]]) -> Iterator[tuple[str, Keys]]:
    for kind, waiting in entries.items():
        if waiting:
            values = [int(entry) % 2**64 for entry in waiting] if kind == "hash" else waiting
            yield kind, _entry_keys(kind, pa.array(values, pa.uint64()).view(pa.int64()) if kind == "hash" else pa.array(values))
            waiting.clear()


def _entry_keys(kind: str, values: pa.Array) -> Keys:
    if kind != "domain":
        return hash_keys(values) if kind == "hash" else text_keys(values)
    names = pc.utf8_lower(pc.replace_substring_regex(values, WILDCARD, ""))
    foreign = names.filter(pc.invert(pc.string_is_ascii(names))).to_pylist()
    others = [_registered(name) for name in foreign if _registered(name) != _looked_up(name)]
    return text_keys(pa.concat_arrays([ascii_hosts(names), pa.array(others, pa.string())]))


class Match:
    """Worker of the second phase: holds the entries of a range, and streams the keys of all files past them."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        low, high = unit.payload["range"]
        for role, lists in unit.payload["lists"].items():
            entries = self._entries(lists, low, high)
            with RowSets(out.path(f"{role}.parquet"), len(unit.payload["keys"])) as hits:
                for number, path in enumerate(unit.payload["keys"]):
                    for keys, rows in read_keys(self.job, path, low, high):
                        hits.add(number, rows[_member(keys, entries)])
            out.rows[f"{role}.parquet"] = hits.writer.count
            out.notes[role] = hits.note()

    def _entries(self, paths: tuple[str, ...], low: int, high: int) -> Keys:
        """Sorted; an entry of several lists comes several times."""
        parts = [keys for path in paths for keys, _ in read_keys(self.job, path, low, high)]
        found = np.concatenate([np.zeros(0, dtype=np.uint64), *parts])
        found.sort()
        return found


def _member(keys: Keys, entries: Keys) -> np.ndarray:
    if not len(entries):
        return np.zeros(len(keys), dtype=bool)
    return entries[np.minimum(np.searchsorted(entries, keys), len(entries) - 1)] == keys


class Admit:
    """Worker of the third phase: counts what the lists take away, and copies the keys of the other rows."""

    def __init__(self, job: Job):
        self.job = job

    def run(self, unit: Unit, out: Output) -> None:
        number, total = unit.payload["number"], unit.payload["total"]
        listed = {role: np.zeros(total, dtype=bool) for role in unit.payload["hits"]}
        for role, paths in unit.payload["hits"].items():
            for path in paths:
                for _, rows in read_keys(self.job, path, number, number + 1):
                    listed[role][rows] = True
        allowed = listed.get("allow", np.ones(total, dtype=bool))
        denied = listed.get("deny", np.zeros(total, dtype=bool))
        for kind in ("url", "hash"):
            with KeyWriter(out.path(f"{kind}.parquet")) as writer:
                for keys, rows in read_keys(self.job, unit.payload[kind]):
                    if kind == "url":
                        out.stats.drop("not_allowed", int((~allowed[rows]).sum()))
                        out.stats.drop("denied", int((allowed[rows] & denied[rows]).sum()))
                    stays = allowed[rows] & ~denied[rows]
                    writer.add(keys[stays], rows[stays])
            out.rows[f"{kind}.parquet"] = writer.count


def list_units(job: Job, earlier: Records) -> Iterable[Unit]:
    for role in ROLES:
        for address, digest in sorted(job.lists.get(role, {}).items(), key=lambda item: (item[1], item[0])):
            yield Unit(f"{role}-{file_name(address)}", (role, digest), {"address": address, "role": role})


def match_units(job: Job, earlier: Records) -> Iterable[Unit]:
    """Decided by the lists' entries and the picked rows' keys of its kind."""
    roles = [role for role in ROLES if job.lists.get(role)]
    for kind in KINDS if roles else ():
        keys = [record.file(f"{kind}.parquet") for record in earlier["pick"]]
        lists = {role: [r.file(f"{kind}.parquet") for r in earlier["lists"] if r.name.startswith(f"{role}-")] for role in roles}
        entries = sum(entry.rows for found in lists.values() for entry in found)
        if not entries:
            continue
        digest = digest_files(*[entry.sha256 for entry in keys], *[f"{r}{e.sha256}" for r, found in lists.items() for e in found])
        payload = {
            "keys": tuple(entry.path for entry in keys),
            "lists": {role: tuple(entry.path for entry in found) for role, found in lists.items()},
        }
        for low, high in ranges(max(entries, sum(entry.rows for entry in keys))):
            yield Unit(f"{kind}-{low:016x}", (digest, f"{low}-{high}"), {**payload, "range": (low, high)})


def admit_units(job: Job, earlier: Records) -> Iterable[Unit]:
    """Decided by a metadata file's own keys and which of its rows are listed."""
    roles = [role for role in ROLES if job.lists.get(role)]
    if not roles:
        return
    picked = earlier["pick"]
    digests = {role: add_notes((record.notes[role] for record in earlier["match"]), len(picked)) for role in roles}
    hits = {role: tuple(record.file(f"{role}.parquet").path for record in earlier["match"]) for role in roles}
    for number, record in enumerate(picked):
        own = {kind: record.file(f"{kind}.parquet") for kind in ("url", "hash")}
        decided = [own["url"].sha256, own["hash"].sha256, *(f"{role}{digests[role][number]}" for role in roles)]
        payload = {kind: entry.path for kind, entry in own.items()} | {
            "number": number,
            "total": record.stats.rows_in,
            "hits": hits,
        }
        yield Unit(record.name, tuple(decided), payload, rows=own["url"].rows)


def admitted(earlier: Records) -> list[UnitRecord]:
    """Per metadata file the record with the keys of the rows that are left before duplicates are looked for."""
    return earlier["admit"] or earlier["pick"]


def digest_files(*digests: str) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
