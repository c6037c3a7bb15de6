"""Datasets: immutable folders whose manifest, written last, is the commit."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast, overload

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, SkipValidation, field_serializer

from infra.cycles import seldom_collected
from infra.entries import fingerprint_of, stages_in
from infra.room import check_room
from infra.sources import StoredSources, written
from infra.store import NotThere, Store, StoreError, sha256_of, stays_below

# Beyond this many files the list moves out of manifest.json into files.parquet beside it, and that of the files from outside into
# sources.parquet: Parquet reads much faster.
FILES_INLINE = 2000
SOURCES_FILE = "sources.parquet"
# Files in one row group of files.parquet, which is what several readers share out.
FILES_TOGETHER = 16384
# Files that `verify` reads at a time; of an object store each is 50 MB ahead.
VERIFIED_AT_ONCE = 8
VERIFY = "`unidiffuser verify` names what is damaged"


# Slots: there are as many of these as files and units, and a model of pydantic takes ten times the memory.
@dataclass(slots=True)
class FileEntry:
    """One file of a dataset; `path` is relative to the store, since units are shared between datasets of a stage."""

    path: str
    rows: int
    bytes: int
    sha256: str
    unit: str

    @property
    def name(self) -> str:
        """Path inside the unit: `00000.tar`, or `uvit/config.json` for a unit that holds folders."""
        name = self.path.split(f"/{self.unit}/", 1)[-1]
        # On an object store the files lie in a folder of the attempt that made them.
        return name.partition("/")[2] if name.startswith("@") else name

    @property
    def stem(self) -> str:
        """The name without folders and ending, which all files of a shard have alike."""
        return PurePosixPath(self.name).stem


@dataclass(slots=True)
class Stats:
    """Rows in, rows out and rows dropped by reason. They always add up: in = out + dropped."""

    rows_in: int = 0
    rows_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def adds_up(self) -> bool:
        return self.rows_in == self.rows_out + sum(self.dropped.values())

    def drop(self, reason: str, rows: int = 1) -> None:
        if rows:
            self.dropped[reason] = self.dropped.get(reason, 0) + rows


class InputRef(BaseModel):
    stage: str
    fingerprint: str


class Manifest(BaseModel):
    """What `<store>/<stage>/<fingerprint>/manifest.json` holds."""

    model_config = ConfigDict(populate_by_name=True)

    stage: str
    node: str
    fingerprint: str
    generation: int
    inputs: dict[str, InputRef]
    config: dict[str, Any]
    sources: SkipValidation[Mapping[str, str]]
    code: dict[str, Any]
    columns: dict[str, str] = Field(alias="schema")
    stats: Stats
    summary: dict[str, Any]
    seconds: float
    created: str
    # Further columns of files.parquet, which say more of each file to whoever reads them.
    file_columns: list[str] = []
    files: Sequence[FileEntry]

    @field_serializer("sources")
    def _plain(self, sources: Mapping[str, str]) -> dict[str, str]:
        return dict(sources)

    def reference(self) -> InputRef:
        return InputRef(stage=self.stage, fingerprint=self.fingerprint)


class Dataset:
    """A committed dataset: its manifest and the store that it lies in.

    A long list of files does not travel with it to other processes; they read it from the store, should they need it.

    Args:
        without: names, less their endings, of files that do not count.
    """

    def __init__(self, store: Store, manifest: Manifest, without: frozenset[str] = frozenset()):
        self.store = store
        self.manifest = manifest
        self.without = without
        if without and not isinstance(manifest.files, StoredFiles):
            left = [entry for entry in manifest.files if entry.stem not in without]
            self.manifest = manifest.model_copy(update={"files": left})

    def __reduce__(self) -> tuple[type[Dataset], tuple[Store, Manifest, frozenset[str]]]:
        manifest = self.manifest
        if not isinstance(manifest.files, StoredFiles) and len(manifest.files) > FILES_INLINE:
            manifest = manifest.model_copy(update={"files": StoredFiles(self.store, self.folder, self.without)})
        return Dataset, (self.store, manifest, self.without)

    @property
    def folder(self) -> str:
        return folder_of(self.manifest.stage, self.manifest.fingerprint)

    @property
    def files(self) -> Sequence[FileEntry]:
        return self.manifest.files

    def open(self, entry: FileEntry) -> BinaryIO:
        return self.store.open(entry.path)

    def url(self, entry: FileEntry) -> str:
        return self.store.url(entry.path)

    @property
    def where(self) -> str:
        """The folder that a person opens: the one that all its files lie in, such as a model; else that of its manifest."""
        folders = {self.url(entry).removesuffix(f"/{entry.name}") for entry in self.files}
        return folders.pop() if len(folders) == 1 else self.store.url(self.folder)

    def fetch(self, folder: Path) -> Path:
        """Make the files available below a local folder; see `fetch_files`."""
        return fetch_files(self.store, self.files, folder)

    def file(self, name: str) -> FileEntry:
        """The file of that name.

        Raises:
            StoreError: the dataset has no such file.
        """
        for entry in self.files:
            if entry.name == name:
                return entry
        raise StoreError(f"{self.store.url(self.folder)}: the manifest lists no file {name}")


def fetch_files(store: Store, files: Sequence[FileEntry], folder: Path, fix: str = VERIFY) -> Path:
    """Make files available below a local folder, under their names; from a local store they are linked, not copied.

    Args:
        fix: what a person is to do about a damaged file.

    Raises:
        NoRoom: this machine's disk is too small for them.
        StoreError: a file is missing, or not the one that its record tells of; or a name leads out of the folder.
    """
    _check_names(store, files, fix)
    if not store.local:
        check_room(folder, sum(entry.bytes for entry in files), store.url(files[0].path) if files else store.root)
    for entry in files:
        target = folder / entry.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if store.local:
                target.symlink_to(store.url(entry.path))
            else:
                store.fetch(entry.path, target)
            found = sha256_of(target)
        except FileNotFoundError:
            raise StoreError(f"{store.url(entry.path)}: no such file; {fix}") from None
        if found != entry.sha256:
            told = f"sha256 {found[:12]}, its record says {entry.sha256[:12]}"
            raise StoreError(f"{store.url(entry.path)}: damaged ({told}); {fix}")
    return folder


def _check_names(store: Store, files: Sequence[FileEntry], fix: str) -> None:
    """Whoever can write a manifest must not choose where on this machine its files come to lie, or what is read instead of them.

    Raises:
        StoreError: a name leads out of the store or of the folder, or is another file's or its folder's too.
    """
    names = [entry.name for entry in files]
    taken = {name for name, count in Counter(names).items() if count > 1} | {
        str(above) for name in names for above in PurePosixPath(name).parents
    }
    for entry, name in zip(files, names, strict=True):
        if not (stays_below(entry.path) and stays_below(name)):
            raise StoreError(f"{store.root}: a record names a file {entry.path!r}, which leads out of its folder; {fix}")
        if name in taken:
            raise StoreError(f"{store.root}: a record names {entry.path!r} in the place of another file; {fix}")


def folder_of(stage: str, fingerprint: str) -> str:
    return f"{stage}/{fingerprint}"


def commit(store: Store, manifest: Manifest, more: pa.Table | None = None) -> Dataset:
    """Write the manifest, which makes the dataset exist; on an object store gives that of another run, if it was the first.

    Args:
        more: further columns for files.parquet, a row for each file; the list of files then lies there however short it is.

    Raises:
        ValueError: the row counts do not add up.
    """
    if not manifest.stats.adds_up():
        stats = manifest.stats
        lost = stats.rows_in - stats.rows_out - sum(stats.dropped.values())
        raise ValueError(f"{manifest.node}: {lost} of {stats.rows_in} rows are neither written nor counted as dropped")
    folder = folder_of(manifest.stage, manifest.fingerprint)
    manifest.file_columns = more.column_names if more is not None else []
    many = more is not None or len(manifest.files) > FILES_INLINE
    document = manifest.model_dump(mode="json", by_alias=True, exclude={"files", "sources"} if many else {"sources"})
    document["sources"] = dict(manifest.sources) if len(manifest.sources) <= FILES_INLINE else None
    if document["sources"] is None:
        store.write(f"{folder}/{SOURCES_FILE}", written(manifest.sources))
    if many:
        columns = {column.name: [getattr(entry, column.name) for entry in manifest.files] for column in fields(FileEntry)}
        table = pa.table(columns)
        if more is not None:
            for name in more.column_names:
                table = table.append_column(more.schema.field(name), more[name])
            table = table.replace_schema_metadata(more.schema.metadata)
        buffer = io.BytesIO()
        binary = [field.name for field in table.schema if pa.types.is_binary(field.type)]
        pq.write_table(
            table, buffer, row_group_size=FILES_TOGETHER, write_page_checksum=True,
            use_dictionary=[name for name in table.column_names if name not in binary],
        )  # fmt: skip
        store.write(f"{folder}/files.parquet", buffer.getvalue())
        document["files"] = None
        # For whoever lists a store, and reads no list of files.
        document["files_bytes"] = sum(entry.bytes for entry in manifest.files)
    # Runs on one disk do every unit together, and what they commit is the same.
    if not store.write_json(f"{folder}/manifest.json", document, once=not store.local):
        return find(store, manifest.stage, manifest.fingerprint) or commit(store, manifest, more)
    return Dataset(store, manifest)


def find(store: Store, stage: str, fingerprint: str) -> Dataset | None:
    """The committed dataset, or None when there is no manifest."""
    folder = folder_of(stage, fingerprint)
    document = store.read_json(f"{folder}/manifest.json")
    if document is None:
        return None
    if document["files"] is None:
        with seldom_collected():
            document["files"] = list(iter(StoredFiles(store, folder)))
    if document["sources"] is None:
        document["sources"] = StoredSources(store, f"{folder}/{SOURCES_FILE}")
    return Dataset(store, Manifest.model_validate(document))


class StoredFiles(Sequence[FileEntry]):
    """The files of a committed dataset as its files.parquet lists them, read whenever they are asked for and never held together.

    The length is counted by reading, and `list` asks for it first: `list(iter(files))` reads once.

    Args:
        without: as of `Dataset`.
    """

    def __init__(self, store: Store, folder: str, without: frozenset[str] = frozenset()):
        self.store, self.folder, self.without = store, folder, without

    def __iter__(self) -> Iterator[FileEntry]:
        """Raises StoreError: the list is damaged."""
        path = f"{self.folder}/files.parquet"
        names = [column.name for column in fields(FileEntry)]
        try:
            with self.store.ranges(path) as file:
                parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
                for batch in parquet.iter_batches(FILES_TOGETHER, columns=names):
                    entries = (FileEntry(*values) for values in zip(*(batch[name].to_pylist() for name in names), strict=True))
                    yield from (entry for entry in entries if entry.stem not in self.without) if self.without else entries
        except (pa.ArrowInvalid, OSError) as error:
            folder = self.store.url(self.folder)
            raise StoreError(f"{self.store.url(path)}: damaged ({error}); delete {folder} and run again") from None

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @overload
    def __getitem__(self, index: int) -> FileEntry: ...
    @overload
    def __getitem__(self, index: slice) -> list[FileEntry]: ...
    def __getitem__(self, index: int | slice) -> FileEntry | list[FileEntry]:
        if isinstance(index, int) and index >= 0:
            for entry in islice(self, index, None):
                return entry
        return list(iter(self))[index]


def all_datasets(store: Store) -> Iterator[Dataset]:
    """Every committed dataset of a store, by stage and fingerprint."""
    for stage in stages_in(store):
        yield from datasets_of(store, stage)


def datasets_of(store: Store, stage: str) -> Iterator[Dataset]:
    """Every committed dataset of a stage, by fingerprint."""
    for fingerprint in store.list(stage):
        found = find(store, stage, fingerprint) if fingerprint != "units" else None
        if found is not None:
            yield found


def by_prefix(store: Store, text: str) -> Dataset:
    """The dataset that a person means by a fingerprint, its first characters, `stage/fingerprint` or a path to it.

    Raises:
        NotThere: there is no store, or no dataset or several datasets match.
    """
    stage, fingerprint = fingerprint_of(store, text)
    dataset = find(store, stage, fingerprint)
    if dataset is None:
        raise NotThere(f"{text}: {stage}/{fingerprint} was removed while it was looked for")
    return dataset


def verify(dataset: Dataset) -> list[str]:
    """Compare every file with the manifest by sha256, several at a time.

    Returns:
        A line for each file that is damaged or missing, in the order of the manifest.
    """
    return damaged_files(dataset.store, dataset.files, "the manifest says")


def damaged_files(store: Store, files: Sequence[FileEntry], says: str = "its record says") -> list[str]:
    """Likewise for some files of a store.

    Args:
        says: who tells the sha256 that a file should have.
    """
    with ThreadPoolExecutor(VERIFIED_AT_ONCE) as threads:
        return [problem for problem in threads.map(partial(_problem, store, says), files) if problem]


def _problem(store: Store, says: str, entry: FileEntry) -> str:
    """What is wrong with a file; empty for nothing."""
    where = store.url(entry.path)
    try:
        with store.open(entry.path) as file:
            found = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
    except StoreError:
        return f"{where}: missing"
    if found != entry.sha256:
        return f"{where}: damaged (sha256 {found[:12]}, {says} {entry.sha256[:12]})"
    return ""


def point(store: Store, recipe: str, node: str, reference: InputRef) -> None:
    """Remember which dataset a recipe's node gave last, so that a later plan can say what changed since."""
    path = f"nodes/{recipe}/{node}.json"
    if store.read_json(path) != reference.model_dump():
        store.write_json(path, reference.model_dump())


def pointed(store: Store, recipe: str, node: str) -> Dataset | None:
    """The dataset that a recipe's node gave last, or None when there is none (any more)."""
    reference = store.read_json(f"nodes/{recipe}/{node}.json")
    return find(store, reference["stage"], reference["fingerprint"]) if reference else None
