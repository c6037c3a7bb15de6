"""What a store holds that no recipe refers to any more: datasets, and units that no dataset and no later run would use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from infra.dataset import Dataset, InputRef, all_datasets, find, pointed
from infra.lease import FOLDER as LEASES
from infra.pins import pinned
from infra.store import Store
from stages.catalog import STAGES, stage_class
from stages.runner.contract import ATTEMPTS, RECORD, StageError
from stages.runner.graph import Planned, plan
from stages.runner.ledger import ledger_of
from stages.runner.packs import RECORD_FILE
from stages.runner.recipe import Recipe
from stages.runner.run import make_job, phase_states

# What belongs to no recipe that is named is left alone for so long: a run may be making it, or somebody about to use it.
GRACE = timedelta(hours=24)
# What took days to make, and that of a recipe which is not named goes only if it is itself named.
PRECIOUS = frozenset({"train", "export"})
LOST = "attempts at units that another one finished"


@dataclass
class Leftover:
    """Units of a stage that belong to no dataset: of runs that never ended, or of phases before a dataset's last. Or attempts at
    units, on an object store, of which another one counts."""

    stage: str
    folders: list[str] = field(default_factory=list)
    bytes: int = 0
    units: int = 0
    what: str = "units of no dataset"

    def add(self, unit: _Unit) -> None:
        self.folders += unit.folders
        self.bytes += unit.bytes
        self.units += 1


@dataclass(frozen=True)
class Others:
    """A dataset that a recipe which was not named refers to or has made; `recipe` is None where nobody knows which."""

    recipe: str | None
    dataset: Dataset

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.dataset.files)


@dataclass
class Garbage:
    """What `collect` removes, and what it leaves alone.

    Attributes:
        datasets: with the bytes of the files that go with each; a file that several share counts with the first.
        leftovers: by stage.
        folders: of the units that go with the datasets.
        young: how many units of no dataset are left alone because of their age.
        young_datasets: how many datasets are.
        strangers: recipes that the store knows and that were not named.
        others: datasets of strangers, which stay unless they are asked for.
        precious: those of them that stay unless they are named.
        others_leftovers: units of no dataset, which may be those of strangers' runs, and stay likewise.
        pinned: datasets that stay whatever the recipes say.
    """

    datasets: list[tuple[Dataset, int]]
    leftovers: list[Leftover]
    folders: list[str]
    young: int
    young_datasets: int
    strangers: list[str]
    others: list[Others]
    precious: list[Others]
    others_leftovers: list[Leftover]
    pinned: list[Dataset]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.datasets) + sum(leftover.bytes for leftover in self.leftovers)


def find_garbage(
    recipes: Sequence[Recipe],
    store: Store,
    now: datetime | None = None,
    keep: Sequence[Dataset] = (),
    remove: Sequence[Dataset] = (),
    others: bool = False,
) -> Garbage:
    """What none of these recipes refers to.

    Kept are the datasets of their nodes, where a node has none yet the one that it gave last, what is pinned, all that these were
    made from, the finished units that a run of them would reuse, and the newest step of every chain.

    Args:
        keep: datasets that are kept as well, with all that they were made from.
        remove: datasets that go whatever their age and whosever they are.
        others: whether what recipes of the store refer to, or have made, goes though they are not named; never their checkpoints.

    Raises:
        RecipeError: a recipe names a file that does not exist.
        StageError: a dataset to remove is kept.
    """
    oldest = (now or datetime.now(UTC)) - GRACE
    planned = [node for recipe in recipes for node in plan(recipe, store).values()]
    pins = [found for stage, fingerprint in sorted(pinned(store)) if (found := find(store, stage, fingerprint))]
    kept = _kept(planned, store, [*keep, *pins])
    everything, owners = list(all_datasets(store)), _Owners(store, recipes)
    chosen = {_id(dataset) for dataset in remove}
    sorts = _sort([dataset for dataset in everything if _id(dataset) not in chosen | kept.keys()], owners, oldest)
    # What stays has what it was made from.
    kept |= _kept([], store, [*sorts.young, *(each.dataset for each in sorts.precious)])
    strange = [each for each in sorts.strange if _id(each.dataset) not in kept]
    if not others:
        kept |= _kept([], store, [each.dataset for each in strange])
    _check_unused(remove, kept, pins, everything)
    going = chosen | {_id(dataset) for dataset in [*sorts.mine, *(each.dataset for each in strange)]}
    doomed = [dataset for dataset in everything if _id(dataset) in going - kept.keys()]
    live = {entry.unit for dataset in kept.values() for entry in dataset.files}
    for node in planned:
        # The finished units that a run of it would reuse.
        live |= {key for state in phase_states(node, store, stage_class(node.stage)) for key in state.keys}
        # The newest step of its chains stays whatever today's plan says: a changed run may be told to go on from it.
        if (head := ledger_of(store, node).head(make_job(node, store, missing_ok=True))) is not None:
            live.add(head.record.key)
    units = _sort_units(store, doomed, kept.values(), live, oldest)
    mine = [left for left in units.leftovers if not owners.strangers or (others and left.stage not in PRECIOUS)]
    return Garbage(
        list(zip(doomed, units.sizes, strict=True)),
        [*mine, *units.attempts],
        units.folders,
        units.young,
        len(sorts.young),
        owners.strangers,
        [] if others else strange,
        sorts.precious,
        [left for left in units.leftovers if left not in mine],
        pins,
    )


@dataclass
class _Sorts:
    """Datasets that no named recipe refers to: too young to tell, of the named recipes, and of others."""

    young: list[Dataset] = field(default_factory=list)
    mine: list[Dataset] = field(default_factory=list)
    strange: list[Others] = field(default_factory=list)
    precious: list[Others] = field(default_factory=list)


def _sort(datasets: Iterable[Dataset], owners: _Owners, oldest: datetime) -> _Sorts:
    sorts = _Sorts()
    for dataset in datasets:
        if datetime.fromisoformat(dataset.manifest.created) > oldest:
            sorts.young.append(dataset)
        elif not owners.is_strange(dataset):
            sorts.mine.append(dataset)
        else:
            found = sorts.precious if dataset.manifest.stage in PRECIOUS else sorts.strange
            found.append(Others(owners.recipe_of(dataset), dataset))
    return sorts


class _Owners:
    """Which recipes of a store, other than those that are named, a dataset belongs to."""

    def __init__(self, store: Store, recipes: Sequence[Recipe]):
        self.store, self.named = store, {recipe.name for recipe in recipes}
        self.strangers = sorted(set(store.list("nodes")) - {"generations", "announced"} - self.named)
        self.used: dict[str, str] = {}
        for stranger in self.strangers:
            nodes = [name.removesuffix(".json") for name in store.list(f"nodes/{stranger}")]
            last = [dataset for node in nodes if (dataset := pointed(store, stranger, node))]
            for fingerprint in _kept([], store, last):
                self.used.setdefault(fingerprint, stranger)

    def recipe_of(self, dataset: Dataset) -> str | None:
        """The stranger that refers to a dataset, or else the recipe that has made it."""
        manifest = dataset.manifest
        if (stranger := self.used.get(manifest.fingerprint)) is not None:
            return stranger
        found = self.store.read_json(f"nodes/announced/{manifest.stage}-{manifest.fingerprint}.json") or {}
        return found.get("recipe")

    def is_strange(self, dataset: Dataset) -> bool:
        recipe = self.recipe_of(dataset)
        return bool(self.strangers) if recipe is None else recipe not in self.named


def _check_unused(
    remove: Sequence[Dataset], kept: Mapping[str, Dataset], pins: Sequence[Dataset], everything: Sequence[Dataset]
) -> None:
    """Refuse to remove what something else needs."""
    for dataset in remove:
        reference = dataset.manifest.reference()
        if _id(dataset) not in kept:
            continue
        why = "a recipe that is named refers to it"
        if _id(dataset) in {_id(each) for each in pins}:
            why = "it is pinned; `unidiffuser keep --remove` unpins it"
        users = [d.manifest for d in everything if _id(d) in kept and reference in d.manifest.inputs.values()]
        if users:
            why = f"{users[0].node} {users[0].fingerprint[:12]}, which stays, was made from it"
        raise StageError(f"{reference.stage}/{reference.fingerprint}: not removed: {why}")


@dataclass
class _Units:
    """Units that no live dataset uses: bytes by doomed dataset and their folders, those of no dataset, attempts at live ones that
    lost, and how many are young."""

    sizes: list[int]
    folders: list[str]
    leftovers: list[Leftover]
    attempts: list[Leftover]
    young: int


def _sort_units(store: Store, doomed: Sequence[Dataset], kept: Iterable[Dataset], live: Set[str], oldest: datetime) -> _Units:
    of: dict[str, int] = {}
    for number, dataset in enumerate(doomed):
        for entry in dataset.files:
            of.setdefault(entry.unit, number)
    sizes, folders, young = [0] * len(doomed), [], 0
    leftovers = {stage: Leftover(stage) for stage in STAGES}
    attempts = []
    for stage in STAGES:
        units, losers = _units(store, stage), Leftover(stage, what=LOST)
        for key, unit in units.items():
            if key in live:
                continue
            if key in of:
                sizes[of[key]] += unit.bytes
                folders += unit.folders
            elif unit.written > oldest:
                young += 1
            else:
                leftovers[stage].add(unit)
        attempts.append(losers)
        for attempt in _lost(store, stage, {key: unit for key, unit in units.items() if key in live}, kept):
            if attempt.written <= oldest:
                losers.add(attempt)
    found, lost = ([left for left in some if left.folders] for some in (leftovers.values(), attempts))
    return _Units(sizes, folders, found, lost, young)


def _lost(store: Store, stage: str, units: Mapping[str, _Unit], kept: Iterable[Dataset]) -> Iterator[_Unit]:
    """Attempts at these units of which another one counts: neither a record nor a dataset that stays names their files."""
    several = [unit for unit in units.values() if len(unit.attempts) > 1]
    if not several:
        return
    named = {_attempt_of(entry.path) for dataset in kept for entry in dataset.files}
    for record in store.read_many([unit.record for unit in several]):
        named |= {_attempt_of(entry.path) for entry in RECORD.validate_json(record).files} if record is not None else set()
    for unit in several:
        # Without a record a run may still be at it, and any may be the one that will count.
        yield from (attempt for folder, attempt in unit.attempts.items() if folder not in named)


def collect(garbage: Garbage, store: Store) -> None:
    """Remove it: the manifests first, so that a reader who comes meanwhile finds no dataset rather than half of one."""
    for dataset, _ in garbage.datasets:
        store.remove(f"{dataset.folder}/manifest.json")
    for dataset, _ in garbage.datasets:
        store.remove(dataset.folder)
        # Made again, it is news again.
        store.remove(f"nodes/announced/{dataset.manifest.stage}-{dataset.manifest.fingerprint}.json")
    for folder in [*garbage.folders, *(folder for leftover in garbage.leftovers for folder in leftover.folders)]:
        store.remove(folder)
    for path, _, written in list(store.walk(LEASES)):
        if written < datetime.now(UTC) - GRACE:
            store.discard(path)


def _kept(planned: Iterable[Planned], store: Store, keep: Sequence[Dataset]) -> dict[str, Dataset]:
    """Datasets by fingerprint: those of the nodes and those named, and all that they were made from."""
    kept: dict[str, Dataset] = {}
    ahead: list[Dataset | None] = [*keep]
    for node in planned:
        ahead.append(find(store, node.stage, node.fingerprint) or pointed(store, node.recipe, node.name))
        # A retried download goes on from the one before, which is an input though no dataset names it yet.
        ahead += [_find(store, reference) for reference in node.inputs.values()]
    while ahead:
        dataset = ahead.pop()
        if dataset is not None and dataset.manifest.fingerprint not in kept:
            kept[dataset.manifest.fingerprint] = dataset
            ahead += [_find(store, reference) for reference in dataset.manifest.inputs.values()]
    return kept


def _id(dataset: Dataset) -> str:
    return dataset.manifest.fingerprint


def _find(store: Store, reference: InputRef) -> Dataset | None:
    return find(store, reference.stage, reference.fingerprint)


@dataclass
class _Unit:
    """A unit of a stage, finished or not, or an attempt at it: its folders, bytes, when the last file was written."""

    folders: list[str]
    record: str = ""
    bytes: int = 0
    written: datetime = datetime.min.replace(tzinfo=UTC)
    attempts: dict[str, _Unit] = field(default_factory=dict)

    def count(self, size: int, moment: datetime) -> None:
        self.bytes, self.written = self.bytes + size, max(self.written, moment)


def _units(store: Store, stage: str) -> dict[str, _Unit]:
    """By key: on an object store a unit's files lie apart from its record."""
    found: dict[str, _Unit] = {}
    for top in (f"{stage}/units", f"{stage}/{ATTEMPTS}"):
        for path, size, moment in store.walk(top):
            folder = "/".join(path.split("/")[:4])
            unit = found.setdefault(folder.rsplit("/", 1)[-1], _Unit([]))
            if folder not in unit.folders:
                unit.folders.append(folder)
            unit.count(size, moment)
            if path.endswith(f"/{RECORD_FILE}"):
                unit.record = path
            elif (attempt := _attempt_of(path)) is not None:
                unit.attempts.setdefault(attempt, _Unit([attempt])).count(size, moment)
    return found


def _attempt_of(path: str) -> str | None:
    """The folder of the attempt that made a file, on an object store."""
    parts = path.split("/")
    return "/".join(parts[:5]) if len(parts) > 5 and parts[4].startswith("@") else None
