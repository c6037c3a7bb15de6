"""The ledger of a node: every chain that it ever grew, with what each was grown with and where it began.

A chain's key says what grows, so another configuration or other data is another chain, and what the first one reached would be
out of sight. The ledger keeps it in sight. A node of a recipe is a line of chains:

    chains/STAGE/RECIPE/NODE/BASE.json    one chain, written once, when it begins; BASE is the digest of what it is grown with
    chains/STAGE/RECIPE/NODE/last.json    the chain that was grown last

Which steps a chain has is no part of it: they are what lies in the store. A chain that begins from a step of another has a key
that names that step, so two recipes that give a chain the same configuration and another start never meet in one. A node that has
reached no step yet takes over the chain of any other node that was grown with just the same: it may be that one, renamed.
"""

from __future__ import annotations

import logging
import posixpath
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.dataset import InputRef, damaged_files
from infra.store import Store, StoreError
from stages.runner.chain import Chain, Gang, unit_key
from stages.runner.contract import Job, Phase, Stage, StageError, UnitRecord, digest_of, result_fields
from stages.runner.graph import Planned
from stages.runner.keys import chain_key

log = logging.getLogger("stages")

FOLDER = "chains"
LAST = "last.json"


class DamagedStep(StoreError):
    """A step from which a chain would begin has a file that is damaged or gone; `unit` is its key."""

    def __init__(self, said: str, unit: str) -> None:
        super().__init__(said)
        self.unit = unit


class Parent(BaseModel):
    """The step that a chain begins from.

    Attributes:
        node: whose step it is: a node, or the address of a folder.
        chain: its key; empty for a folder, which belongs to no chain.
        step: of that chain.
        begins: the step at which the count of the new chain begins.
        keep: what is taken over; a stage's own words.
        changed: what the new chain has otherwise, a line each.
        grown: whether nothing but the data is another, and all of the old is in it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    node: str
    chain: str
    step: int
    begins: int
    keep: tuple[str, ...]
    changed: tuple[str, ...] = ()
    grown: bool = False

    @property
    def unit(self) -> str:
        """Key of the unit that the step is."""
        return unit_key(self.chain, self.step)


class Entry(BaseModel):
    """One chain of a line; `root` tells lines apart that were begun from different things outside, and is empty where unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    key: str
    root: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, InputRef]
    created: str
    parent: Parent | None


def _reached(job: Job, entry: Entry) -> int:
    """The newest step of a chain, 0 for none."""
    return max(Chain(job, entry.key, 0).done(), default=0)


@dataclass(frozen=True)
class Start:
    """Where a chain that is not in the ledger yet begins: from nothing, or from a step; `root` as of `Entry`."""

    parent: Parent | None = None
    root: str = ""


@dataclass(frozen=True)
class Head:
    """The newest step of a line, and the chain that it belongs to."""

    entry: Entry
    step: int
    record: UnitRecord


@dataclass(frozen=True)
class Ledger:
    """The chains of one node of one recipe, in one store; `damaged` are the keys of steps that nothing can begin from."""

    store: Store
    stage: str
    recipe: str
    node: str
    damaged: frozenset[str] = frozenset()

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.stage}/{self.recipe}/{self.node}"

    def entry(self, base: str) -> Entry | None:
        """The chain that is grown with just this.

        Raises:
            StoreError: its record is damaged.
        """
        path = f"{self.folder}/{base}.json"
        return self._read([path]).get(path)

    def entries(self) -> list[Entry]:
        """All chains, in the order in which they began.

        Raises:
            StoreError: a record is damaged.
        """
        names = [name for name in self.store.list(self.folder) if name.endswith(".json") and name != LAST]
        found = self._read([f"{self.folder}/{name}" for name in names]).values()
        return sorted(found, key=lambda entry: (entry.created, entry.base))

    def elsewhere(self, job: Job, base: str) -> Entry | None:
        """The chain that another node, of any recipe, has grown with just this; of several the one that has come furthest.

        Raises:
            StoreError: a record is damaged.
        """
        found = self._read([path for path in self._others() if posixpath.basename(path) == f"{base}.json"]).values()
        whole = [entry for entry in found if entry.parent is None or entry.parent.unit not in self.damaged]
        return max(whole, key=lambda entry: (_reached(job, entry), entry.created), default=None)

    def alike(self, job: Job, entry: Entry) -> tuple[str, int, Entry] | None:
        """Where a node of this name has come furthest with the same data or the same fields: the recipe, the step, the chain.

        Raises:
            StoreError: a record is damaged.
        """
        found = []
        for path, other in self._read([path for path in self._others() if path.split("/")[3] == self.node]).items():
            if other.inputs == entry.inputs or other.config == entry.config:
                found.append((path.split("/")[2], _reached(job, other), other))
        furthest = max(found, key=lambda each: each[1], default=None)
        return furthest if furthest is not None and furthest[1] > 0 else None

    def _others(self) -> list[str]:
        """Where the chains of all other nodes are written down."""
        every = [path for path, _, _ in self.store.walk(f"{FOLDER}/{self.stage}") if path.endswith(".json")]
        return [path for path in every if posixpath.dirname(path) != self.folder and posixpath.basename(path) != LAST]

    def _read(self, paths: list[str]) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for path, data in zip(paths, self.store.read_many(paths), strict=True):
            try:
                found |= {path: Entry.model_validate_json(data)} if data is not None else {}
            except ValidationError:
                raise StoreError(f"{self.store.url(path)}: no record of a chain; delete the file and run again") from None
        return found

    def enter(self, entry: Entry) -> Entry:
        """Write a chain down, unless another run was the first to do so; gives what is written."""
        path = f"{self.folder}/{entry.base}.json"
        with self.store.claimed(path):
            found = self.entry(entry.base)
            if found is not None:
                return found
            if self.store.write_json(path, entry.model_dump(mode="json"), once=True):
                return entry
        return self.entry(entry.base) or entry

    def leave(self, base: str) -> None:
        """Forget a chain that has no step and can begin from none."""
        self.store.remove(f"{self.folder}/{base}.json")

    def grows(self, base: str) -> None:
        """Remember which chain is grown last."""
        self.store.write_json(f"{self.folder}/{LAST}", {"base": base})

    def head(self, job: Job) -> Head | None:
        """The newest step of the line: of the chain that was grown last, or, while that has none, of the one that has come
        furthest. None when no step of any is there; step 0 is none, for nothing was done to reach it."""
        heads = {}
        for entry in self.entries():
            done = self.whole(job, entry.key)
            if max(done, default=0) > 0:
                heads[entry.base] = Head(entry, max(done), done[max(done)])
        last = self.store.read_json(f"{self.folder}/{LAST}") or {"base": ""}
        furthest = max(heads.values(), key=lambda head: (head.step, head.entry.created), default=None)
        return heads.get(last["base"], furthest)

    def whole(self, job: Job, chain: str) -> dict[int, UnitRecord]:
        """The steps of a chain, without those that are damaged, ascending."""
        return {step: record for step, record in Chain(job, chain, 0).done().items() if record.key not in self.damaged}

    def at(self, job: Job, step: int, head: Head) -> Head | None:
        """A certain step of the line: that of the head's chain, of those before it, or of any other; None when there is none."""
        entries = {entry.key: entry for entry in self.entries()}
        before: Entry | None = head.entry
        ahead: dict[str, Entry] = {}
        while before is not None and before.key not in ahead:
            ahead[before.key] = before
            before = entries.get(before.parent.chain) if before.parent else None
        for key, entry in (ahead | dict(reversed(entries.items()))).items():
            if unit_key(key, step) not in self.damaged and (record := job.unit_done(unit_key(key, step))) is not None:
                return Head(entry, step, record)
        return None


def where_it_begins(chain: Chain, planned: Planned) -> str:
    """For people: the step at which a run of the chain begins, and from what."""
    there = chain.done()
    start = chain.start(there)
    if start in there:
        step = f"step {start} of a run that reached {max(there)}"
        return f"{step} is there already" if start == chain.end else f"goes on at {step}"
    if there:
        return f"begins at step {start}: no step up to {chain.end} is left of a run that reached {max(there)}"
    passed_by = _passed_by(chain, planned)
    if (parent := chain.parent) is None:
        return f"begins at step 0{passed_by}"
    changed = f" ({'; '.join(parent.changed)})" if parent.changed else ""
    kept = ", ".join(parent.keep)
    return f"begins at step {parent.begins} from step {parent.step} of {parent.node} with its {kept}{changed}{passed_by}"


def _passed_by(chain: Chain, planned: Planned) -> str:
    """Whose steps a person may have thought of who has renamed or copied a recipe, and changed it too."""
    ledger, entry = ledger_of(chain.job.store, planned), chain.entry
    if entry is None or planned.generation or ledger.head(chain.job) is not None:
        return ""
    other = None
    # Another's ledger that is damaged keeps nobody from beginning.
    with suppress(StoreError):
        other = ledger.alike(chain.job, entry)
    if other is None:
        return ""
    recipe, step, before = other
    names = sorted({*before.config, *entry.config})
    fields = ", ".join(name for name in names if before.config.get(name) != entry.config.get(name))
    told = fields or ("data" if before.inputs != entry.inputs else "code")
    return f"; recipe {recipe} has {step} steps of it with other {told}: give this one its name to go on from them"


def ledger_of(store: Store, planned: Planned, damaged: frozenset[str] = frozenset()) -> Ledger:
    return Ledger(store, planned.stage, planned.recipe, planned.name, damaged)


def chain_of(
    stage: type[Stage], phase: Phase, gang: Gang, job: Job, planned: Planned, damaged: frozenset[str] = frozenset()
) -> Chain:
    """The chain that a phase grows, as the ledger has it, or as it would be entered there; nothing is written.

    Args:
        damaged: keys of steps that it is not to begin from.

    Raises:
        StageError: it would begin anew although its line has steps, what it is to begin from is not there, or it would end there.
        KeyError: the job lacks an input without which that cannot be told.
    """
    base, ledger = chain_key(stage, phase, planned), ledger_of(job.store, planned, damaged)
    entry = ledger.entry(base)
    if entry is None and ledger.head(job) is None:
        entry = ledger.elsewhere(job, base)
    if entry is None:
        begun = bool(Chain(job, base, 0).done())
        try:
            start = Start(root=gang.root(planned)) if begun else gang.begins(stage, job, planned, ledger)
        except DamagedStep as error:
            log.warning("%s: it does not begin from a step that is damaged: %s", job.node, error)
            return chain_of(stage, phase, gang, job, planned, damaged | {error.unit})
        entry = Entry(
            base=base,
            key=base if start.parent is None else digest_of([base, start.parent.chain, start.parent.step]),
            root=start.root,
            version=stage.version,
            config=grown_with(phase, planned.config),
            inputs=planned.inputs,
            created=datetime.now(UTC).isoformat(),
            parent=start.parent,
        )
    return _chain(gang, job, entry)


def _chain(gang: Gang, job: Job, entry: Entry) -> Chain:
    chain = Chain(job, entry.key, gang.end(job.config, entry.parent), entry)
    if entry.parent is not None and chain.end <= chain.begins:
        raise StageError(
            f"{job.node}: steps {chain.end} are not beyond step {chain.begins} of {entry.parent.node}, at which it begins; "
            "raise steps"
        )
    return chain


def grown_with(phase: Phase, config: Any) -> dict[str, Any]:
    """What a chain's entry says of its configuration: every field that decides it, those at their defaults too."""
    return {name: value for name, value in result_fields(config).items() if phase.fields is None or name in phase.fields}


def entered(stage: type[Stage], phase: Phase, gang: Gang, job: Job, planned: Planned) -> Chain:
    """The chain of `chain_of`, as the ledger has it from now on, and as the one that is grown last.

    What it begins from is read before: where that is damaged, it begins from an older step.
    """
    ledger, damaged = ledger_of(job.store, planned), frozenset[str]()
    while True:
        chain = chain_of(stage, phase, gang, job, planned, damaged)
        assert chain.entry is not None
        parent = chain.parent
        if parent is None or not parent.chain or chain.done() or not (wrong := _wrong(job, parent)):
            break
        log.warning("%s: it does not begin from step %d of %s, which is damaged: %s", job.node, parent.step, parent.node, wrong)
        ledger.leave(chain.entry.base)
        damaged |= {parent.unit}
    entry = ledger.enter(chain.entry)
    ledger.grows(entry.base)
    return chain if entry == chain.entry else _chain(gang, job, entry)


def _wrong(job: Job, parent: Parent) -> str:
    """What keeps a step from being begun from; empty for nothing."""
    record = job.unit_done(parent.unit)
    if record is None:
        return f"{job.store.url(job.unit_folder(parent.unit))}: removed"
    return "; ".join(damaged_files(job.store, record.files))
