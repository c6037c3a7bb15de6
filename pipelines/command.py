"""The `unidiffuser` command. Torch, Ray and Prefect are imported where they are needed, so that the rest answers at once."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="unidiffuser",
    help="From image-text metadata to a trained any-to-any model, step by step and each step only once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# A file or a pipe has no width of its own; tables need some.
console = Console() if sys.stdout.isatty() else Console(width=160)

StoreOption = Annotated[
    str,
    typer.Option("--store", envvar="UNIDIFFUSER_STORE", help="Folder or fsspec URL of the datasets.", metavar="STORE"),
]
RecipeArgument = Annotated[Path, typer.Argument(help="Recipe file (YAML).", metavar="RECIPE")]
DatasetArgument = Annotated[
    str, typer.Argument(help="Fingerprint or its first characters, STAGE/FINGERPRINT, or the folder's path.", metavar="DATASET")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a field of the recipe.", metavar="a.b=c")]
JobsOption = Annotated[int, typer.Option("--jobs", min=1, help="How many nodes work at a time.")]
KeepOption = Annotated[bool, typer.Option("--keep", help="Leave the servers and the UI up until Ctrl-C.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Common options; `main` reads them from the command line."""


@app.command(epilog="Example: unidiffuser run configs/demo.yaml --set subsets.little.filter.min_side=256")
def run(
    recipe: RecipeArgument,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this node (repeatable).", metavar="NODE")] = None,
    start: Annotated[str | None, typer.Option("--from", help="This node and what follows from it.", metavar="NODE")] = None,
    until: Annotated[str | None, typer.Option("--until", help="This node and what it needs.", metavar="NODE")] = None,
    force: Annotated[list[str] | None, typer.Option("--force", help="Make this node again (repeatable).", metavar="NODE")] = None,
    overrides: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say for each node hit, stale or miss, and why.")] = False,
    jobs: JobsOption = 1,
    keep: KeepOption = False,
    store: StoreOption = "runs",
) -> None:
    """Run a recipe; what is committed and unchanged is reused."""
    from infra.store import Store
    from pipelines import conduct
    from stages.recipe import load_recipe

    wish = conduct.Wish(only or (), start, until, force or (), overrides or (), jobs, keep)
    loaded = load_recipe(recipe, wish.overrides)
    if dry_run:
        conduct.dry_run(loaded, Store(store), wish, console)
    else:
        raise typer.Exit(conduct.run_recipe(loaded, Store(store), wish, console))


@app.command(epilog="Example: unidiffuser demo --keep")
def demo(overrides: SetOption = None, jobs: JobsOption = 1, keep: KeepOption = False, store: StoreOption = "runs") -> None:
    """Build a little web of images, and train a model on it from metadata to samples."""
    from infra.store import Store
    from pipelines import conduct
    from pipelines.demo import run_demo

    raise typer.Exit(run_demo(Store(store), conduct.Wish(overrides=overrides or (), jobs=jobs, keep=keep), console))


@app.command(epilog="Example: unidiffuser status configs/demo.yaml --json")
def status(recipe: RecipeArgument, overrides: SetOption = None, as_json: JsonOption = False, store: StoreOption = "runs") -> None:
    """Nodes of a recipe with fingerprints, rows, state, and where they lie."""
    from infra.store import Store
    from pipelines.inspection import status_rows, status_table
    from stages.recipe import load_recipe

    rows = status_rows(load_recipe(recipe, overrides or ()), Store(store))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        console.print(status_table(rows))


@app.command(epilog="Example: unidiffuser lineage 3f9a2c")
def lineage(dataset: DatasetArgument, as_json: JsonOption = False, store: StoreOption = "runs") -> None:
    """The tree of what made a dataset, and what it made."""
    from infra.dataset import by_prefix
    from infra.store import Store
    from pipelines.inspection import lineage_tree
    from pipelines.lineage import ancestors, descendants

    place = Store(store)
    found = by_prefix(place, dataset)
    up, down = ancestors(place, found), descendants(place, found)
    if as_json:
        print(json.dumps({**up.as_json("inputs"), "made": down.as_json("made")["made"]}, indent=1))
    else:
        console.print(lineage_tree("made from", up))
        console.print(lineage_tree("used by", down))


@app.command(epilog="Example: unidiffuser inspect filter/3f9a2c")
def inspect(dataset: DatasetArgument, store: StoreOption = "runs") -> None:
    """Schema, counts, a few rows, and a picture where there is one."""
    from infra.dataset import by_prefix
    from infra.store import Store
    from pipelines.inspection import inspect_dataset

    inspect_dataset(by_prefix(Store(store), dataset), console)


@app.command(epilog="Example: unidiffuser verify 3f9a2c")
def verify(dataset: DatasetArgument, store: StoreOption = "runs") -> None:
    """Compare every file of a dataset with its manifest; exit code 1 and the names on damage."""
    from infra.dataset import by_prefix
    from infra.dataset import verify as problems_of
    from infra.store import Store

    found = by_prefix(Store(store), dataset)
    problems = problems_of(found)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    console.print(f"{found.manifest.node} {found.manifest.fingerprint}: {len(found.files)} files are as the manifest says")


def main() -> None:
    """Entry point: errors that a person can mend are one line; 2 means misuse, 1 failure, 130 an interruption."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    # A terminal that closes, or a `kill`, ends the command as Ctrl-C does: with the servers stopped.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    try:
        app(args=[argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug or not (code := _exit_code(error)):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)


def _exit_code(error: Exception) -> int:
    from infra.processes import ServerError
    from infra.store import StoreError
    from stages.contract import StageError
    from stages.recipe import RecipeError

    if isinstance(error, RecipeError):
        return 2
    return 1 if isinstance(error, StageError | StoreError | ServerError | OSError) else 0


if __name__ == "__main__":
    main()
