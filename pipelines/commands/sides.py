"""What A and B of `unidiffuser compare` mean: a dataset, a node or a whole recipe of the store, or a checkpoint in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from infra.dataset import Dataset, by_prefix, datasets_of, find, pointed
from infra.store import Store
from pipelines.commands.checkpoints import Misuse
from stages.runner.recipe import load_recipe

# What `sample` takes, the better one first.
CHECKPOINTS = ("export", "train")


@dataclass(frozen=True)
class Made:
    """A dataset of a side, of which a folder's provenance tells less than the dataset itself: its files are only in the store.

    Attributes:
        weights: SHA-256 of a folder's files of weights, by name.
    """

    node: str
    stage: str
    fingerprint: str
    config: dict[str, Any]
    code: dict[str, Any]
    sources: Mapping[str, str]
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    inputs: tuple[str, ...]
    created: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    dataset: Dataset | None = None
    weights: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """A or B.

    Attributes:
        name: as the person wrote it.
        head: the node that is compared; None of a whole recipe.
        made: its datasets by node, each behind what it was made from.
        checkpoint: what `sample` takes, and the store that it lies in; None where there is nothing to draw with.
    """

    name: str
    head: str | None
    made: dict[str, Made]
    store: Store
    checkpoint: str | None


def side_of(text: str, store: Store) -> Side:
    """What a person means.

    Args:
        text: a recipe's file or name, which is its newest datasets; RECIPE/NODE, the newest of a node; a dataset as every command
            takes it, also of another store by its path; or a folder with a checkpoint in any layout.

    Raises:
        Misuse, NotThere, RecipeError: it is none of these.
    """
    path = Path(text)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _recipe(text, load_recipe(path).name, store)
    if (path / "manifest.json").is_file():
        store = Store(str(path.resolve().parent.parent))
    elif path.is_dir():
        from unidiffuser.layouts import set_layout

        if set_layout(path) is not None:
            return _folder(text, path, store)
    recipe, _, node = text.partition("/")
    if recipe in store.list("nodes") and recipe != "announced":
        if not node:
            return _recipe(text, recipe, store)
        if (found := pointed(store, recipe, node)) is not None:
            return _dataset(text, found)
    return _dataset(text, by_prefix(store, text))


def _recipe(text: str, recipe: str, store: Store) -> Side:
    nodes = [name.removesuffix(".json") for name in store.list(f"nodes/{recipe}")]
    newest = [dataset for node in nodes if (dataset := pointed(store, recipe, node)) is not None]
    if not newest:
        raise Misuse(f"{text}: the recipe {recipe} has no dataset in {store.root} yet; run it, or name another --store")
    own = {dataset.manifest.fingerprint for dataset in newest}
    made = {one.node: one for one in _with_ancestors(newest) if one.fingerprint in own}
    return Side(text, None, made, store, _checkpoint(made.values()))


def _dataset(text: str, dataset: Dataset) -> Side:
    """A dataset, all that it was made from, and what evaluated it."""
    manifest, store = dataset.manifest, dataset.store
    made = {one.node: one for one in _with_ancestors([dataset])}
    judged = {manifest.fingerprint} | {ref.fingerprint for name, ref in manifest.inputs.items() if name == "checkpoint"}
    for evaluation in sorted(datasets_of(store, "evaluate"), key=lambda each: each.manifest.created):
        reference = evaluation.manifest.inputs.get("checkpoint")
        if manifest.stage in CHECKPOINTS and reference is not None and reference.fingerprint in judged:
            made[evaluation.manifest.node] = _made(evaluation)
    head = made[manifest.node]
    drawn = [head] if manifest.stage in CHECKPOINTS else [one for one in made.values() if one.fingerprint in judged]
    return Side(text, manifest.node, made, store, _checkpoint(drawn))


def _folder(text: str, path: Path, store: Store) -> Side:
    from unidiffuser.provenance import PROVENANCE, weights_digests
    from unidiffuser.tensors import read_settings

    told = read_settings(path / PROVENANCE) if (path / PROVENANCE).is_file() else {}
    own = {**told, "node": told.get("node", path.name), "stage": told.get("stage", "folder")}
    made = [_recorded(each) for each in told.get("datasets", ())]
    head = replace(_recorded(own), weights=weights_digests(path))
    if evaluation := told.get("evaluation"):
        found = _recorded({"node": "evaluate", "stage": "evaluate", "fingerprint": evaluation["fingerprint"]})
        made.append(replace(found, summary={"figures": evaluation["figures"]}))
    return Side(text, head.node, {one.node: one for one in [*made, head]}, store, text)


def _recorded(record: Mapping[str, Any]) -> Made:
    """A dataset as provenance tells of it."""
    return Made(
        node=record.get("node") or f"removed-{record['stage']}", stage=record["stage"],
        fingerprint=record.get("fingerprint", ""), config=record.get("config", {}),
        code={"git": record.get("commit")}, sources={}, rows_in=record.get("rows_in", 0),
        rows_out=record.get("rows_out", 0), dropped=record.get("dropped", {}), inputs=(),
    )  # fmt: skip


def _with_ancestors(datasets: Iterable[Dataset]) -> Iterator[Made]:
    """Datasets and all that they were made from, each once, and behind what it was made from."""
    seen = set[str]()

    def grow(dataset: Dataset) -> Iterator[Made]:
        if dataset.manifest.fingerprint in seen:
            return
        seen.add(dataset.manifest.fingerprint)
        for reference in dataset.manifest.inputs.values():
            before = find(dataset.store, reference.stage, reference.fingerprint)
            yield from grow(before) if before is not None else ()
        yield _made(dataset)

    for dataset in datasets:
        yield from grow(dataset)


def _made(dataset: Dataset) -> Made:
    manifest = dataset.manifest
    return Made(
        manifest.node, manifest.stage, manifest.fingerprint, manifest.config, manifest.code, manifest.sources,
        manifest.stats.rows_in, manifest.stats.rows_out, manifest.stats.dropped,
        tuple(reference.fingerprint for reference in manifest.inputs.values()), manifest.created, manifest.summary, dataset,
    )  # fmt: skip


def _checkpoint(made: Iterable[Made]) -> str | None:
    """The last export of some datasets, or the last training if there is no export."""
    found = list(made)
    for stage in CHECKPOINTS:
        if names := [f"{one.stage}/{one.fingerprint}" for one in found if one.stage == stage]:
            return names[-1]
    return None
