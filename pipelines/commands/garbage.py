"""`unidiffuser gc`: what no named recipe refers to, shown and on request removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from infra.dataset import Dataset, by_prefix
from infra.store import Store
from pipelines.commands.brief import moment, short
from pipelines.commands.checkpoints import Misuse
from pipelines.commands.terminal import ReportTable
from stages.runner.garbage import Garbage, Leftover, Others, collect, find_garbage
from stages.runner.recipe import Recipe, RecipeError, load_recipe


@dataclass(frozen=True)
class Wanted:
    """What the person at the command asked for.

    Attributes:
        overrides: what the recipes give with these is kept as well.
        keep: further datasets to keep, as `by_prefix` takes them.
        remove: datasets that go whosever they are.
        others: whether those of recipes that are not named go; None where nothing was said of them.
    """

    recipes: Sequence[Path]
    overrides: Sequence[str] = ()
    keep: Sequence[str] = ()
    remove: Sequence[str] = ()
    others: bool | None = None
    delete: bool = False


def gc(wanted: Wanted, store: Store, console: Console, ask: Callable[[str], bool] | None) -> dict[str, Any]:
    """Show what goes, and remove it if asked to; returns what a script would read.

    Args:
        ask: puts a question to the person; None where there is nobody to answer.

    Raises:
        RecipeError: a recipe is not as it must be.
        NotThere: there is no such store or dataset.
        StageError: a dataset to remove is needed.
        Misuse: something of recipes that are not named would go as well, and nobody has said whether it is to.
    """
    store.check_there()
    recipes = [*map(load_recipe, wanted.recipes), *_changed(wanted.recipes, wanted.overrides)]
    keep, remove = ([by_prefix(store, text) for text in texts] for texts in (wanted.keep, wanted.remove))

    def find(others: bool) -> Garbage:
        return find_garbage(recipes, store, keep=keep, remove=remove, others=others)

    garbage = find(bool(wanted.others))
    _show(garbage, console)
    if wanted.delete and wanted.others is None and (garbage.others or garbage.others_leftovers):
        if ask is None:
            raise Misuse(_refusal(garbage))
        if ask("Remove what is of recipes that are not named as well?"):
            garbage = find(others=True)
    if wanted.delete:
        collect(garbage, store)
    if not garbage.datasets and not garbage.leftovers:
        console.print("nothing to remove")
    elif wanted.delete:
        console.print(f"removed {decimal(garbage.bytes)}")
    else:
        console.print(f"{decimal(garbage.bytes)} would be removed; --delete removes it")
    return _as_json(garbage, wanted.delete)


def _refusal(garbage: Garbage) -> str:
    recipes = ", ".join(dict.fromkeys(each.recipe or "unknown" for each in garbage.others)) or ", ".join(garbage.strangers)
    units = sum(left.units for left in garbage.others_leftovers)
    return (
        f"nothing was removed: {len(garbage.others):,} datasets and {units:,} units of no dataset may be of recipes that are not "
        f"named ({recipes}); name these, or say --others to remove them too, --no-others to leave them"
    )


def _show(garbage: Garbage, console: Console) -> None:
    """What goes, and what stays and why."""
    if garbage.datasets or garbage.leftovers:
        console.print(_table(garbage))
    if garbage.others or garbage.others_leftovers:
        console.print("of recipes that are not named; --others removes it as well:", style="yellow", markup=False)
        console.print(_others_table(garbage.others, garbage.others_leftovers))
    if garbage.precious:
        console.print(
            "checkpoints of recipes that are not named, stay with what they were made from; --remove DATASET removes one:"
        )
        console.print(_others_table(garbage.precious, ()))
    if garbage.pinned:
        names = ", ".join(f"{each.manifest.node} {short(each.manifest.fingerprint)}" for each in garbage.pinned)
        console.print(f"pinned, and stays with what it was made from: {names}")
    for count, what in ((garbage.young_datasets, "datasets that no recipe refers to"), (garbage.young, "units of no dataset")):
        if count:
            console.print(f"{count:,} {what} are younger than a day and left alone: a run may need them")


def _as_json(garbage: Garbage, deleted: bool) -> dict[str, Any]:
    def described(dataset: Dataset, size: int) -> dict[str, Any]:
        manifest = dataset.manifest
        return {"node": manifest.node, "stage": manifest.stage, "fingerprint": manifest.fingerprint, "bytes": size}

    def units(leftovers: Sequence[Leftover]) -> list[dict[str, Any]]:
        return [{"stage": left.stage, "what": left.what, "units": left.units, "bytes": left.bytes} for left in leftovers]

    return {
        "deleted": deleted,
        "bytes": garbage.bytes,
        "datasets": [described(dataset, size) for dataset, size in garbage.datasets],
        "units": units(garbage.leftovers),
        "left_alone": garbage.young,
        "datasets_left_alone": garbage.young_datasets,
        "pinned": [each.manifest.fingerprint for each in garbage.pinned],
        "recipes_not_named": garbage.strangers,
        "others": [{"recipe": each.recipe, **described(each.dataset, each.bytes)} for each in garbage.others],
        "others_units": units(garbage.others_leftovers),
        "checkpoints_of_others": [{"recipe": each.recipe, **described(each.dataset, each.bytes)} for each in garbage.precious],
    }


def _changed(recipes: Sequence[Path], overrides: Sequence[str]) -> list[Recipe]:
    """The recipes with the overrides, where they have such fields; one of them must."""
    changed, refused = [], []
    for path in recipes if overrides else ():
        try:
            changed.append(load_recipe(path, overrides))
        except RecipeError as error:
            refused.append(error)
    if refused and not changed:
        raise refused[0]
    return changed


def _table(garbage: Garbage) -> Table:
    table = ReportTable()
    for head in ("what", "made"):
        table.add_column(head, no_wrap=True)
    for head in ("units", "size"):
        table.add_column(head, no_wrap=True, justify="right")
    for dataset, size in garbage.datasets:
        manifest = dataset.manifest
        table.add_row(f"{manifest.node} {short(manifest.fingerprint)}", moment(manifest.created), "", decimal(size))
    for left in garbage.leftovers:
        table.add_row(f"{left.stage}: {left.what}", "", f"{left.units:,}", decimal(left.bytes))
    return table


def _others_table(others: Sequence[Others], leftovers: Sequence[Leftover]) -> Table:
    """A row for each recipe and node, and the last ones' fingerprints where there are few."""
    table = ReportTable()
    for head in ("recipe", "node"):
        table.add_column(head, overflow="fold")
    for head in ("count", "size"):
        table.add_column(head, no_wrap=True, justify="right")
    table.add_column("fingerprint", no_wrap=True)
    groups: dict[tuple[str, str], list[Others]] = {}
    for each in others:
        groups.setdefault((each.recipe or "unknown", each.dataset.manifest.node), []).append(each)
    for (recipe, node), found in sorted(groups.items()):
        newest = max(found, key=lambda each: each.dataset.manifest.created).dataset.manifest
        more = ", ..." if len(found) > 1 else ""
        size = decimal(sum(each.bytes for each in found))
        table.add_row(recipe, node, f"{len(found):,}", size, short(newest.fingerprint) + more)
    for left in leftovers:
        table.add_row("unknown", f"{left.stage}: units", f"{left.units:,}", decimal(left.bytes), "")
    return table
