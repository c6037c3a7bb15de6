"""What a store holds that no recipe refers to any more: datasets, and units that no dataset and no later run would use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from infra.dataset import Dataset, InputRef, all_datasets, find, pointed
from infra.store import Store
from stages.catalog import STAGES, stage_class
from stages.runner.graph import Planned, plan
from stages.runner.recipe import Recipe
from stages.runner.run import phase_states

# Units that belong to no dataset are left alone for so long: a run may be making them.
GRACE = timedelta(hours=24)


@dataclass
class Leftover:
    """Units of a stage that belong to no dataset: of runs that never ended, or of phases before a dataset's last."""

    stage: str
    folders: list[str] = field(default_factory=list)
    bytes: int = 0


@dataclass
class Garbage:
    """What `collect` removes.

    Attributes:
        datasets: with the bytes of the files that go with each; a file that several share counts with the first.
        leftovers: by stage.
        folders: of the units that go with the datasets.
        young: how many units of no dataset are left alone because of their age.
        strangers: recipes that the store knows and that were not named.
    """

    datasets: list[tuple[Dataset, int]]
    leftovers: list[Leftover]
    folders: list[str]
    young: int
    strangers: list[str]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.datasets) + sum(leftover.bytes for leftover in self.leftovers)


def find_garbage(recipes: Sequence[Recipe], store: Store, now: datetime | None = None, keep: Sequence[Dataset] = ()) -> Garbage:
    """What none of these recipes refers to.

    Kept are the datasets of their nodes, where a node has none yet the one that it gave last, all that these were made from, and
    the finished units that a run of them would reuse.

    Args:
        keep: datasets that are kept as well, with all that they were made from.

    Raises:
        RecipeError: a recipe names a file that does not exist.
    """
    planned = [node for recipe in recipes for node in plan(recipe, store).values()]
    kept = _kept(planned, store, keep)
    live = {entry.unit for dataset in kept.values() for entry in dataset.files}
    for node in planned:
        # The finished units that a run of it would reuse.
        live |= {key for state in phase_states(node, store, stage_class(node.stage)) for key in state.keys}
    doomed = [dataset for dataset in all_datasets(store) if dataset.manifest.fingerprint not in kept]
    owners: dict[str, int] = {}
    for number, dataset in enumerate(doomed):
        for entry in dataset.files:
            owners.setdefault(entry.unit, number)
    sizes = [0] * len(doomed)
    folders: list[str] = []
    leftovers = {stage: Leftover(stage) for stage in STAGES}
    young, oldest = 0, (now or datetime.now(UTC)) - GRACE
    for stage in STAGES:
        for folder, (size, written) in _units(store, stage).items():
            key = folder.rsplit("/", 1)[-1]
            if key in live:
                continue
            if key in owners:
                sizes[owners[key]] += size
                folders.append(folder)
            elif written > oldest:
                young += 1
            else:
                leftovers[stage].folders.append(folder)
                leftovers[stage].bytes += size
    return Garbage(
        list(zip(doomed, sizes, strict=True)),
        [leftover for leftover in leftovers.values() if leftover.folders],
        folders,
        young,
        sorted(set(store.list("nodes")) - {"generations", "announced"} - {recipe.name for recipe in recipes}),
    )


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


def _find(store: Store, reference: InputRef) -> Dataset | None:
    return find(store, reference.stage, reference.fingerprint)


def _units(store: Store, stage: str) -> dict[str, tuple[int, datetime]]:
    """Folder of every unit of a stage, finished or not: its bytes, and when the last file was written."""
    sizes: dict[str, int] = defaultdict(int)
    written: dict[str, datetime] = {}
    for path, size, moment in store.walk(f"{stage}/units"):
        folder = "/".join(path.split("/")[:4])
        sizes[folder] += size
        written[folder] = max(moment, written.get(folder, moment))
    return {folder: (sizes[folder], written[folder]) for folder in written}
