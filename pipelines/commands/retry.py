"""`unidiffuser retry-failed`: the rows of a download whose failure can heal are fetched again, as a new dataset of the same node.

The new dataset is the node's next generation and names the old one as its input ``parent``. It holds all rows, old and new;
shards in which nothing could heal are the parent's own files. The next `unidiffuser run` of the recipe goes on from it.
"""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from infra.dataset import Dataset, find
from infra.store import Store
from pipelines.commands.conduct import Wish, run_recipe
from pipelines.flows.run import Run, plan_run
from stages.runner.contract import StageError
from stages.runner.graph import Planned, plan
from stages.runner.recipe import Recipe, RecipeError, load_recipe

SNAPSHOTS = ".state/recipes"


def retry_failed(dataset: Dataset, store: Store, recipe: Recipe | None, console: Console) -> int:
    """Fetch again what can heal; returns the exit code of the run, 0 when there is nothing to do.

    Args:
        recipe: the one that the dataset belongs to; None looks among those that have been run on this store.

    Raises:
        RecipeError: the dataset is no download, or no known recipe makes it.
        StageError: it has been retried before.
    """
    manifest = dataset.manifest
    name = f"{manifest.stage}/{manifest.fingerprint}"
    if manifest.stage != "download":
        raise RecipeError(f"{name} is a dataset of {manifest.stage}; expected one of download, whose rows can fail and heal")
    if not manifest.summary["can_heal"]:
        console.print(f"{manifest.node} {manifest.fingerprint}: no row failed in a way that can heal")
        return 0
    recipe, planned = find_node(dataset, store, recipe)
    if planned.fingerprint == manifest.fingerprint:
        plan(recipe, store, retry=frozenset({planned.name}))
    elif find(store, planned.stage, planned.fingerprint) is not None:
        raise StageError(f"{name} has been retried already; its newest is {planned.stage}/{planned.fingerprint}")
    # Else its retry was begun and cut off: the run goes on with it.
    return run_recipe(recipe, store, Wish(only=[planned.name]), console, lambda run: _say_healed(run, planned.name, console))


def find_node(dataset: Dataset, store: Store, recipe: Recipe | None) -> tuple[Recipe, Planned]:
    """The recipe and node that a dataset, or the retry of it that was begun, belongs to.

    Raises:
        RecipeError: there is none.
    """
    wanted = dataset.manifest.reference()
    for known in [recipe] if recipe else _known_recipes(store):
        try:
            planned = plan_run(known, store)
        except RecipeError:
            if recipe:
                raise
            # Its files are gone, or it was written for another release.
            continue
        for node in planned.values():
            if node.stage == wanted.stage and (node.fingerprint == wanted.fingerprint or node.inputs.get("parent") == wanted):
                return known, node
    where = f"the recipe {recipe.name}" if recipe else f"no recipe that was run on {store.root}"
    verb = "does not make" if recipe else "makes"
    raise RecipeError(f"{where} {verb} {wanted.stage}/{wanted.fingerprint} as its newest; name the one that does with --recipe")


def _known_recipes(store: Store) -> list[Recipe]:
    """The recipes that have been run on a store, the latest first."""
    recipes = []
    for name in sorted(store.list(SNAPSHOTS), key=lambda name: store.modified(f"{SNAPSHOTS}/{name}"), reverse=True):
        try:
            # The copy is nobody's file: a deployment belongs to the one that it was made of.
            recipes.append(replace(load_recipe(store.url(f"{SNAPSHOTS}/{name}")), file=""))
        except RecipeError:
            continue
    return recipes


def _say_healed(run: Run, node: str, console: Console) -> None:
    outcome = run.outcomes.get(node)
    if outcome is not None and outcome.dataset is not None:
        summary = outcome.dataset.manifest.summary
        console.print(
            f"{node}: {summary['healed']:,} of {summary['retried']:,} rows healed, {summary['can_heal']:,} may still; "
            f"the next run of {run.recipe.name} goes on from {run.planned[node].fingerprint}",
            soft_wrap=True,
        )
