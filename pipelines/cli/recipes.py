"""What is done with a recipe: run it, ask how far it is, put it on a server."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

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
    say_where_nothing_is,
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
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Run a recipe; what is committed and unchanged is reused."""
    from infra.store import Store
    from pipelines.commands import conduct
    from stages.runner.recipe import load_recipe

    wish = conduct.Wish(only or (), start, until, force or (), overrides or (), jobs, keep)
    loaded = load_recipe(recipe, wish.overrides)
    # With --json what a person reads goes to stderr.
    view = Console(stderr=True) if as_json else console
    if dry_run:
        say_where_nothing_is(Store(store))
        found = conduct.dry_run(loaded, Store(store), wish, view)
        if as_json:
            print(json.dumps(found, indent=1))
        return
    told = (lambda run: print(json.dumps(conduct.summary(run), indent=1), flush=True)) if as_json else None
    raise typer.Exit(conduct.run_recipe(loaded, Store(store), wish, view, told))


@group.command(rich_help_panel="Recipes", epilog="Example: unidiffuser demo --keep")
def demo(
    overrides: SetOption = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Begin with an untrained network, not the base.")] = False,
    jobs: JobsOption = 1,
    keep: KeepOption = False,
    store: StoreOption = "runs",
) -> None:
    """Build a little web of images, and train a model on it from metadata to samples."""
    from infra.store import Store
    from pipelines.commands import conduct
    from pipelines.commands.demo import run_demo

    wish = conduct.Wish(overrides=overrides or (), jobs=jobs, keep=keep)
    raise typer.Exit(run_demo(Store(store), wish, console, from_scratch))


@group.command(
    rich_help_panel="Recipes",
    epilog="Example: unidiffuser plan configs/paper-v0.yaml --gpus 88 --gpu a100-80g --mfu 0.175 --price 2.0",
)
def plan(
    recipe: RecipeArgument,
    gpus: Annotated[int | None, typer.Option("--gpus", help="How many; by default the recipe's workers.", metavar="N")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Their kind, such as a100-80g; without it, this machine.", metavar="NAME")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option("--mfu", help="Share of their peak that training reaches, if not as measured.", metavar="X")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", help="Dollars a GPU-hour.", metavar="P")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """What a recipe will take: rows, bytes, requests, time, memory and cost, on GPUs that are named or on this machine.

    Nothing is run or fetched. For this machine it is measured how fast it is, which takes up to a minute.
    """
    from infra.store import Store
    from pipelines.commands import planning
    from stages.runner.recipe import load_recipe

    wish = planning.wish_of(gpus, gpu, mfu, price)
    view, place = Console(stderr=True) if as_json else console, Store(store)
    found = planning.make_plan(load_recipe(recipe, overrides or ()), place, wish, view)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        planning.show(found, console)
    planning.publish(found, place, view)


@group.command(rich_help_panel="Recipes", epilog="Example: unidiffuser status configs/demo.yaml --json")
def status(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again as it changes, until Ctrl-C.")] = False,
    paths: Annotated[bool, typer.Option("--paths", help="Say where each dataset lies, too.")] = False,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Nodes of a recipe with rows, state, fingerprints or why not, and what became of the rows."""
    from infra.store import Store
    from pipelines.commands.inspection import show_paths, status_rows, status_view, watch_status
    from stages.runner.recipe import load_recipe

    checked = load_recipe(recipe, overrides or ())
    say_where_nothing_is(Store(store))
    if watch:
        watch_status(checked, Store(store), console)
    rows = status_rows(checked, Store(store))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        console.print(status_view(checked, rows))
        if paths:
            show_paths(rows, console)


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
def deploy(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the name over from another recipe file or store; its schedules go.")
    ] = False,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Register a recipe on the Prefect server: a deployment of all and one of every node, with its schedules.

    Pools of type docker and kubernetes take an image of `infra/Dockerfile` as `deploy.pool.variables.image`.
    """
    from infra.external import state_folder
    from infra.store import Store
    from pipelines.commands.deployment import deploy_recipe
    from stages.runner.recipe import load_recipe

    place = Store(store)
    view = Console(stderr=True) if as_json else console
    done = deploy_recipe(load_recipe(recipe, overrides or ()), place, state_folder(place), view, replace)
    if as_json:
        print(json.dumps(done, indent=1))


@group.command(rich_help_panel="Recipes", epilog="Example: unidiffuser undeploy configs/demo.yaml")
def undeploy(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name that it is deployed under.", metavar="RECIPE")],
    others: Annotated[bool, typer.Option("--others", help="Also if another recipe file or store has deployed it.")] = False,
    store: StoreOption = "runs",
) -> None:
    """Remove a recipe's deployments from the Prefect server, with their schedules and triggers; its datasets stay."""
    from infra.store import Store
    from pipelines.commands.deployment import undeploy_recipe

    undeploy_recipe(recipe, Store(store), others, console)


@group.command(rich_help_panel="Recipes", epilog="Example: unidiffuser fields train")
def fields(
    node: Annotated[str | None, typer.Argument(help="A stage, or a node such as aesthetic-filter.", metavar="NODE")] = None,
    as_json: JsonOption = False,
    page: Annotated[bool, typer.Option("--page", help="Print all of them as a page in Markdown.")] = False,
) -> None:
    """Every field of a recipe: what it is, its bounds and its default."""
    from pipelines.commands import fields as reference

    if as_json:
        print(json.dumps(reference.as_json(node), indent=1))
    elif page:
        print(reference.page(), end="")
    else:
        reference.show(node, console)
