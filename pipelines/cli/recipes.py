"""What is done with a recipe: run it, ask how far it is, put it on a server."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipelines.cli.options import (
    JobsOption,
    JsonOption,
    KeepOption,
    RecipeArgument,
    SetOption,
    StoreOption,
    console,
    node_option,
    nodes_of,
)

group = typer.Typer()


@group.command(
    rich_help_panel="Recipes", epilog="Example: unidiffuser run configs/demo.yaml --set subsets.little.filter.min_side=256"
)
def run(
    recipe: RecipeArgument,
    only: Annotated[list[str] | None, node_option("--only", "Only this node (repeatable).")] = None,
    start: Annotated[str | None, node_option("--from", "This node and what follows from it.")] = None,
    until: Annotated[str | None, node_option("--until", "This node and what it needs.")] = None,
    force: Annotated[list[str] | None, node_option("--force", "Make this node again (repeatable).")] = None,
    overrides: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say for each node hit, stale or miss, and why.")] = False,
    jobs: JobsOption = 1,
    keep: KeepOption = False,
    store: StoreOption = "runs",
) -> None:
    """Run a recipe; what is committed and unchanged is reused."""
    from infra.store import Store
    from pipelines.commands import conduct
    from stages.runner.recipe import load_recipe

    wish = conduct.Wish(only or (), start, until, force or (), overrides or (), jobs, keep)
    loaded = load_recipe(recipe, wish.overrides)
    if dry_run:
        conduct.dry_run(loaded, Store(store), wish, console)
    else:
        raise typer.Exit(conduct.run_recipe(loaded, Store(store), wish, console))


@group.command(rich_help_panel="Recipes", epilog="Example: unidiffuser demo --keep")
def demo(overrides: SetOption = None, jobs: JobsOption = 1, keep: KeepOption = False, store: StoreOption = "runs") -> None:
    """Build a little web of images, and train a model on it from metadata to samples."""
    from infra.store import Store
    from pipelines.commands import conduct
    from pipelines.commands.demo import run_demo

    raise typer.Exit(run_demo(Store(store), conduct.Wish(overrides=overrides or (), jobs=jobs, keep=keep), console))


@group.command(rich_help_panel="Recipes", epilog="Example: unidiffuser status configs/demo.yaml --json")
def status(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again as it changes, until Ctrl-C.")] = False,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Nodes of a recipe with fingerprints, rows, state, and where they lie."""
    from infra.store import Store
    from pipelines.commands.inspection import funnel_table, status_rows, status_table, watch_status
    from stages.runner.recipe import load_recipe

    checked = load_recipe(recipe, overrides or ())
    if watch:
        watch_status(checked, Store(store), console)
    rows = status_rows(checked, Store(store))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        console.print(status_table(rows), funnel_table(checked, rows))


@group.command(rich_help_panel="Recipes", epilog="Example: unidiffuser logs configs/demo.yaml train-512 --follow")
def logs(
    recipe: RecipeArgument,
    node: Annotated[str, typer.Argument(help="Node of the recipe.", metavar="NODE", autocompletion=nodes_of)],
    overrides: SetOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come, until the job has ended.")] = False,
    store: StoreOption = "runs",
) -> None:
    """Print the log of a node's newest job, whether it runs, failed or ended well."""
    from infra.store import Store
    from pipelines.commands.logs import lines_of
    from stages.runner.recipe import load_recipe

    for line in lines_of(load_recipe(recipe, overrides or ()), node, Store(store), follow):
        print(line, flush=follow)


@group.command(rich_help_panel="Recipes", epilog="Example: unidiffuser deploy configs/demo.yaml")
def deploy(recipe: RecipeArgument, overrides: SetOption = None, store: StoreOption = "runs") -> None:
    """Register a recipe on the Prefect server: a deployment of all and one of every node, with its schedules.

    Pools of type docker and kubernetes take an image of `infra/Dockerfile` as `deploy.pool.variables.image`.
    """
    from infra.external import state_folder
    from infra.store import Store
    from pipelines.commands.conduct import deploy_recipe
    from stages.runner.recipe import load_recipe

    place = Store(store)
    deploy_recipe(load_recipe(recipe, overrides or ()), place, state_folder(place), console)
