"""What a stage is: a declared function from datasets to a dataset. The runner does everything that all stages share."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from infra.dataset import Dataset, FileEntry, InputRef, Stats
from infra.queries import said
from infra.scratch import scratch_folder
from infra.store import Store, StoreError
from stages.runner.packs import FEW, RECORD_FILE, Packs

if TYPE_CHECKING:
    from stages.runner.chain import Gang


# Folder of a stage for the files of attempts at units, on object stores.
ATTEMPTS = "attempts"


class StageError(Exception):
    """A stage that cannot go on; the message is one line that names the thing and the fix."""


class Bug(StageError):
    """A stage that broke in a way that nobody foresaw: the line says where, and the traceback goes to the log."""


class SetAside(Exception):
    """A unit that its worker has tried often enough: it stands aside at once, and the others are done. The message says why."""


def in_words(error: BaseException) -> str:
    """``TypeName: message``, on one line."""
    return " ".join(said(f"{type(error).__name__}: {error}").split()).removesuffix(":")


# The field of a configuration that names shards to leave out; see `stages.runner.skipping`.
SKIP = "skip"


def operational(default: Any, description: str, **bounds: Any) -> Any:
    """A config field that can change how a result is reached, never the result: it stays out of every fingerprint."""
    return Field(default, description=description, json_schema_extra={"operational": True}, **bounds)


class StageConfig(BaseModel):
    """Base of every stage's configuration and of its parts: unknown fields are errors, and so are numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NodeConfig(StageConfig):
    """Base of the configuration of a stage's node."""

    machines: str | None = operational(None, "custom resource of Ray whose machines do the work; any machine when not given")


def _is_operational(model: type[BaseModel], name: str) -> bool:
    extra = model.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("operational"))


def result_fields(config: BaseModel) -> dict[str, Any]:
    """The configuration as JSON values, nested models included, without the operational fields; under the names of a recipe."""
    values: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        if not _is_operational(type(config), name):
            values[info.alias or name] = told(getattr(config, name))
    return values


def told(value: Any) -> Any:
    """A value of a configuration as JSON; of a model its `result_fields`."""
    if isinstance(value, BaseModel):
        return result_fields(value)
    if isinstance(value, list | tuple):
        return [told(each) for each in value]
    return TypeAdapter(Any).dump_python(value, mode="json")


def canonical(value: Any) -> str:
    """A value's canonical JSON: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(value: Any) -> str:
    """24 hex digits of the sha256 of a value's canonical JSON."""
    return digest_of_text(canonical(value))


def digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work that is done or not done.

    Attributes:
        name: stable and readable; names the unit's files (``00003``).
        digests: what decides the result besides the config: sha256 of the unit's own input files, step numbers.
        payload: JSON that tells the worker what to read.
        rows: rows that go in, for progress.
        shared: key of a unit of an earlier dataset of the stage that has just this result; instead of a key of its own.
    """

    name: str
    digests: tuple[str, ...]
    payload: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    shared: str | None = None


@dataclass(slots=True)
class UnitRecord:
    """`unit.json`: written after the unit's files, it makes the unit done."""

    key: str
    name: str
    files: list[FileEntry]
    stats: Stats
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def file(self, name: str) -> FileEntry:
        """The unit's file of this name."""
        return next(entry for entry in self.files if entry.name == name)


RECORD = TypeAdapter(UnitRecord)


@dataclass(frozen=True)
class Job:
    """All that a phase needs to know; pickled to the workers.

    `inputs` are committed datasets by input name, `sources` files from outside as address -> digest, `weights` encoder
    weights as config field -> digest, `lists` further files from outside, by the part they play. `recipe` is the name of the one
    that asks, where it is known.
    """

    store: Store
    stage: str
    node: str
    config: Any
    inputs: Mapping[str, Dataset]
    sources: Mapping[str, str]
    weights: Mapping[str, str]
    lists: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    recipe: str | None = None

    def unit_folder(self, key: str) -> str:
        return f"{self.stage}/units/{key[:2]}/{key}"

    def record_path(self, key: str) -> str:
        return f"{self.unit_folder(key)}/{RECORD_FILE}"

    def many(self, units: int) -> bool:
        """Whether the records of so many units are read and written in packs: a local folder opens them one by one as fast."""
        return not self.store.local and units > FEW

    def unit_done(self, key: str) -> UnitRecord | None:
        return self.units_done([key]).get(key)

    def units_done(self, keys: Sequence[str], packs: Packs | None = None) -> dict[str, UnitRecord]:
        """The records of those units that are done.

        Args:
            packs: to note what they lack.

        Raises:
            StoreError: a record is damaged.
        """
        paths = {self.record_path(key): key for key in keys}
        if self.many(len(paths)):
            found = (packs or Packs(self.store, self.stage)).read(list(paths))
        else:
            every = zip(paths, self.store.read_many(list(paths)), strict=True)
            found = ((path, data) for path, data in every if data is not None)
        records = {}
        for path, data in found:
            try:
                records[paths[path]] = RECORD.validate_json(data)
            except ValidationError:
                raise StoreError(f"{self.store.url(path)}: no record of a unit; delete the file and run again") from None
        return records


class Output:
    """Where a worker puts the files of one unit: a scratch folder that `publish` moves into the store, then the record."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.stats = Stats()
        self.notes: dict[str, Any] = {}
        self.rows: dict[str, int] = {}
        # Called by the worker of a phase with `at_once` above 1 when another unit can begin beside this one.
        self.give_room: Callable[[], None] = lambda: None

    def path(self, name: str, rows: int = 0) -> Path:
        """Local path for a file of the unit; `rows` (settable later through `self.rows`) goes into the manifest."""
        self.rows[name] = rows
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, job: Job, key: str, name: str, seconds: float) -> UnitRecord:
        """The unit's record; that of another run, if it was the first to finish this unit."""
        files, folder = [], job.unit_folder(key)
        # A lease on an object store may end while a unit is at work: two runs then write beside each other, and one record
        # counts. The records lie apart from the files, so that listing them is a request a thousand units.
        if not job.store.local:
            folder = f"{attempts_folder(job.stage, key)}/@{uuid4().hex[:8]}"
        for filename in sorted(self.rows):
            path = f"{folder}/{filename}"
            size, digest = job.store.publish(self.folder / filename, path)
            files.append(FileEntry(path=path, rows=self.rows[filename], bytes=size, sha256=digest, unit=key))
        return write_record(job, UnitRecord(key, name, files, self.stats, self.notes, seconds))


def attempts_folder(stage: str, key: str) -> str:
    """Where on an object store the files of a unit lie, those of each attempt at it in a folder of its own."""
    return f"{stage}/{ATTEMPTS}/{key[:2]}/{key}"


def write_record(job: Job, record: UnitRecord) -> UnitRecord:
    """Write the record that makes a unit done; gives that of another run, if it was the first."""
    written = job.store.write_json(job.record_path(record.key), RECORD.dump_python(record, mode="json"), once=True)
    return record if written else job.units_done([record.key])[record.key]


@contextmanager
def scratch_output(store: Store) -> Iterator[Output]:
    """An `Output` whose scratch folder is gone afterwards, also after an error.

    Raises:
        StageError: the disk of the scratch folder or that of the store is full.
    """
    with scratch_folder() as folder:
        try:
            yield Output(folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = store.free_bytes()
            scratch = free is None or shutil.disk_usage(folder).free < free
            place, fix = (gettempdir(), "point TMPDIR") if scratch else (store.root, "point --store")
            raise StageError(
                f"no space is left in {place}; free some or {fix} elsewhere, and run again: what is done is kept"
            ) from error


class Worker(Protocol):
    """Runs units of one phase; built once per process, so that encoders are loaded once."""

    def run(self, unit: Unit, out: Output) -> None: ...


@dataclass(frozen=True)
class Resources:
    """What one worker takes, and how many workers at most (None: as many as the cluster holds); memory in bytes, 0 for little.

    `machines` is the custom resource of those that it may be on; the pool sets it.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    workers: int | None = None
    memory: float = 0.0
    machines: str | None = None


def single_trainer(config: Any) -> Resources:
    """The one worker of a phase that trains a small model: with a GPU, or with the cores of a small machine, which are idle."""
    from infra.ray_nodes import total
    from stages.runner.cluster import gpus_each

    gpus, cpus = gpus_each(config.machines), total("CPU", config.machines) or 1
    return Resources(cpus=1 if gpus else min(4, cpus), gpus=gpus, workers=1)


Records = Mapping[str, list[UnitRecord]]


@dataclass(frozen=True)
class Phase:
    """One round of units, planned from the rounds before.

    Attributes:
        plan: (job, records of the earlier phases by phase name) -> units, in the order of the dataset's files.
        worker: job -> Worker, called once in each worker process.
        gang: for a chain (each unit builds on the one before), in place of both.
        fields: the config fields that this phase's result depends on; None means all. Others may change without redoing it.
        by_content: the digests of its units are all that decides it: they name what matters of configuration, weights and inputs.
        resources: config -> what a worker takes.
        memory: the config fields of which lower values take less memory.
        at_once: units that one worker may have at once, in threads; it says by `Output.give_room` when the next can begin.
        least_limit: config -> seconds that a unit may take in any case, however fast the others are.
        takes_sources: whether its workers read `Job.sources`; else these stay behind, for units name what they read.
    """

    name: str
    plan: Callable[[Job, Records], Iterable[Unit]] = lambda job, earlier: ()
    worker: Callable[[Job], Worker] | None = None
    gang: Gang | None = None
    fields: frozenset[str] | None = None
    by_content: bool = False
    resources: Callable[[Any], Resources] = lambda config: Resources()
    memory: tuple[str, ...] = ()
    at_once: int = 1
    least_limit: Callable[[Any], float] = lambda config: 0.0
    takes_sources: bool = True


class Stage:
    """Base of the stages; a subclass declares, the runner acts.

    Class attributes:
        name, version: the version goes up when the same config and inputs give another result.
        Config: pydantic model of the configuration.
        phases: in order; the files of the last one are the dataset's.
        whole: names of inputs whose fingerprint decides every unit (a text codec, a checkpoint); the units of the other
            inputs are decided by their own files.
        names_datasets: the field of its configuration that names datasets of the store, for `datasets`.
        may_be_empty: whether zero rows out is a result rather than a failure.
        can_heal: whether another try at the same units may end better (the network was down): if no row is left, the units are
            not kept.
        check_refuses: whether what `check` finds stands in the way of a run. Else it is a warning when the run begins: the node
            will fail, and others go on.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    Config: ClassVar[type[BaseModel]]
    phases: ClassVar[tuple[Phase, ...]]
    whole: ClassVar[frozenset[str]] = frozenset()
    names_datasets: ClassVar[str] = "from"
    may_be_empty: ClassVar[bool] = False
    can_heal: ClassVar[bool] = False
    check_refuses: ClassVar[bool] = True

    @classmethod
    def sources(cls, config: Any) -> list[str]:
        """Files from outside the store: paths, globs or fsspec URLs. `Job.sources` holds what they resolved to."""
        return []

    @classmethod
    def lists(cls, config: Any) -> dict[str, list[str]]:
        """Further files from outside by the part they play, which decides too; `Job.lists` holds what they resolved to."""
        return {}

    @classmethod
    def datasets(cls, config: Any, store: Store) -> dict[str, InputRef]:
        """Datasets of the store that a configuration names itself, by input name.

        Raises:
            NotThere: there is no such dataset.
        """
        return {}

    @classmethod
    def check(cls, config: Any, sources: Mapping[str, str], lists: Mapping[str, Mapping[str, str]]) -> None:
        """Open what lies outside as far as it takes to say that it can be used; called before anything runs.

        Args:
            sources, lists: as of `Job`.

        Raises:
            StageError: a file cannot be used.
        """

    @classmethod
    def check_before(
        cls,
        config: Any,
        lists: Mapping[str, Mapping[str, str]],
        before: Mapping[str, Sequence[Any]],
        inputs: Mapping[str, Any],
    ) -> None:
        """Hold a configuration, and what lies outside, against what the nodes before this one will make; called after `check`.

        Args:
            lists: as of `Job`.
            before: stage -> the configurations of the nodes of the recipe that lead to this one, near or far.
            inputs: input name -> the configuration of the node that it is.

        Raises:
            StageError: the two do not go together.
        """

    @classmethod
    def weights(cls, config: Any) -> dict[str, str]:
        """Encoder weights that the result depends on, as config field -> digest."""
        return {}

    @classmethod
    def bytes_needed(cls, job: Job) -> int:
        """Disk space that the stage will take at most, in bytes, as well as can be told beforehand."""
        return sum(entry.bytes for dataset in job.inputs.values() for entry in dataset.files)

    @classmethod
    def schema(cls, job: Job, records: list[UnitRecord]) -> dict[str, str]:
        """Column name -> type of the dataset's rows."""
        return {}

    @classmethod
    def file_columns(cls, job: Job, records: list[UnitRecord]) -> Any:
        """What is told of each file besides its entry, as an Arrow table of a row a file, in the order of the records; None for
        nothing. It goes into files.parquet, where the readers of a dataset find it without opening the files."""
        return None

    @classmethod
    def summary(cls, job: Job, records: Records) -> dict[str, Any]:
        """Small JSON facts about the result (metrics, histograms), shown in the artifacts."""
        return {}
