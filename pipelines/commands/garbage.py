"""`unidiffuser gc`: what no named recipe refers to, shown and on request removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from infra.dataset import by_prefix
from infra.store import Store
from pipelines.commands.terminal import ReportTable, moment, short
from stages.runner.garbage import Garbage, collect, find_garbage
from stages.runner.recipe import Recipe, RecipeError, load_recipe


def gc(
    recipes: Sequence[Path], overrides: Sequence[str], keep: Sequence[str], store: Store, delete: bool, console: Console
) -> dict[str, Any]:
    """Show what goes, and remove it if asked to; returns what a script would read.

    Args:
        overrides: what the recipes give with these is kept as well.
        keep: further datasets to keep, as `by_prefix` takes them.

    Raises:
        RecipeError: a recipe is not as it must be.
        StoreError: there is no such dataset to keep, or several.
    """
    wanted = [*map(load_recipe, recipes), *_changed(recipes, overrides)]
    garbage = find_garbage(wanted, store, keep=[by_prefix(store, text) for text in keep])
    if garbage.datasets or garbage.leftovers:
        console.print(_table(garbage))
    if garbage.strangers:
        named = ", ".join(garbage.strangers)
        console.print(f"not named, so what only they refer to goes as well: {named}", style="yellow", markup=False)
    if garbage.young:
        console.print(f"{garbage.young:,} units younger than a day, of no dataset yet, are left alone: a run may be making them")
    if delete:
        collect(garbage, store)
    if not garbage.datasets and not garbage.leftovers:
        console.print("nothing to remove")
    elif delete:
        console.print(f"removed {decimal(garbage.bytes)}")
    else:
        console.print(f"{decimal(garbage.bytes)} would be removed; --delete removes it")
    return {
        "deleted": delete,
        "bytes": garbage.bytes,
        "datasets": [
            {"node": d.manifest.node, "stage": d.manifest.stage, "fingerprint": d.manifest.fingerprint, "bytes": size}
            for d, size in garbage.datasets
        ],
        "units": [{"stage": left.stage, "units": len(left.folders), "bytes": left.bytes} for left in garbage.leftovers],
        "left_alone": garbage.young,
        "recipes_not_named": garbage.strangers,
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
        table.add_row(f"{left.stage}: units of no dataset", "", f"{len(left.folders):,}", decimal(left.bytes))
    return table
