"""What is done with datasets: read, check, fetch again, remove."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipelines.cli.options import DatasetArgument, JsonOption, SetOption, StoreOption, console

group = typer.Typer()


@group.command(rich_help_panel="Datasets", epilog="Example: unidiffuser lineage 3f9a2c")
def lineage(dataset: DatasetArgument, as_json: JsonOption = False, store: StoreOption = "runs") -> None:
    """The tree of what made a dataset, and what it made."""
    from infra.dataset import by_prefix
    from infra.store import Store
    from pipelines.commands.inspection import lineage_tree
    from pipelines.pages.lineage import ancestors, descendants

    place = Store(store)
    found = by_prefix(place, dataset)
    up, down = ancestors(place, found), descendants(place, found)
    if as_json:
        print(json.dumps({**up.as_json("inputs"), "made": down.as_json("made")["made"]}, indent=1))
    else:
        console.print(lineage_tree("made from", up))
        console.print(lineage_tree("used by", down))


@group.command(rich_help_panel="Datasets", epilog="Example: unidiffuser inspect filter/3f9a2c")
def inspect(dataset: DatasetArgument, as_json: JsonOption = False, store: StoreOption = "runs") -> None:
    """Schema, counts, histograms, a few rows, and a picture where there is one; as JSON the whole manifest."""
    from infra.dataset import by_prefix
    from infra.store import Store
    from pipelines.commands.inspection import dataset_facts, inspect_dataset

    found = by_prefix(Store(store), dataset)
    if as_json:
        print(json.dumps(dataset_facts(found), indent=1))
    else:
        inspect_dataset(found, console)


@group.command(rich_help_panel="Datasets", epilog="Example: unidiffuser verify 3f9a2c")
def verify(dataset: DatasetArgument, as_json: JsonOption = False, store: StoreOption = "runs") -> None:
    """Compare every file of a dataset with its manifest; exit code 1 and the names on damage."""
    from infra.dataset import by_prefix
    from infra.dataset import verify as problems_of
    from infra.store import Store

    found = by_prefix(Store(store), dataset)
    problems = problems_of(found)
    if as_json:
        named = {"node": found.manifest.node, **found.manifest.reference().model_dump()}
        print(json.dumps({**named, "files": len(found.files), "problems": problems}, indent=1))
    else:
        for problem in problems:
            print(problem)
    if problems:
        raise typer.Exit(1)
    if not as_json:
        told = f"{found.manifest.node} {found.manifest.fingerprint}: {len(found.files):,} files are as the manifest says"
        console.print(told, highlight=False)


@group.command("list", rich_help_panel="Datasets", epilog="Example: unidiffuser list --stage filter")
def list_datasets(
    stage: Annotated[str | None, typer.Option("--stage", help="Only those of this stage.", metavar="STAGE")] = None,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """The datasets of a store."""
    from infra.store import Store
    from pipelines.commands.kept import dataset_rows, dataset_table

    rows = dataset_rows(Store(store), stage)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        console.print(dataset_table(rows))


@group.command(rich_help_panel="Datasets", epilog="Example: unidiffuser keep export/3f9a2c")
def keep(
    dataset: DatasetArgument,
    remove: Annotated[bool, typer.Option("--remove", help="No longer keep it.")] = False,
    store: StoreOption = "runs",
) -> None:
    """Pin a dataset: `gc` leaves it, and all that it was made from, whatever recipes it is told of."""
    from infra.store import Store
    from pipelines.commands import kept

    kept.keep(dataset, Store(store), remove, console)


@group.command(rich_help_panel="Datasets", epilog="Example: unidiffuser gc configs/demo.yaml --delete")
def gc(
    recipes: Annotated[list[Path], typer.Argument(help="Every recipe whose data is to be kept.", metavar="RECIPE...")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Keep also what `run --set` gave (repeatable).", metavar="a.b=c")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="Keep this too, and all it was made from (repeatable).", metavar="DATASET"),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", help="This goes, whosever it is and however young (repeatable).", metavar="DATASET"),
    ] = None,
    others: Annotated[
        bool | None,
        typer.Option("--others/--no-others", help="What is of recipes that are not named goes too, or stays."),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; otherwise it is only listed.")] = False,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Datasets and units that no named recipe refers to, nor any dataset that is kept.

    What other recipes of the store refer to, or have made, goes only with --others; their checkpoints only by --remove.
    """
    from infra.store import Store
    from pipelines.commands import garbage

    view = Console(stderr=True) if as_json else console
    ask = typer.confirm if sys.stdin.isatty() and view.is_terminal and not as_json else None
    wanted = garbage.Wanted(recipes, overrides or (), keep or (), remove or (), others, delete)
    found = garbage.gc(wanted, Store(store), view, ask)
    if as_json:
        print(json.dumps(found, indent=1))


@group.command(rich_help_panel="Datasets", epilog="Example: unidiffuser retry-failed download/3f9a2c")
def retry_failed(
    dataset: DatasetArgument,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Recipe that it belongs to; else the one that made it.", metavar="RECIPE")
    ] = None,
    overrides: SetOption = None,
    store: StoreOption = "runs",
) -> None:
    """Fetch again the rows of a download whose failure can heal, as a new dataset that the recipe goes on from."""
    from infra.dataset import by_prefix
    from infra.store import Store
    from pipelines.commands import retry
    from stages.runner.recipe import load_recipe

    place = Store(store)
    loaded = load_recipe(recipe, overrides or ()) if recipe else None
    raise typer.Exit(retry.retry_failed(by_prefix(place, dataset), place, loaded, console))
