"""`unidiffuser undeploy` as a person sees it."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from infra.external import state_folder
from infra.store import Store
from pipelines.commands.conduct import QUIET_PREFECT, server_errors
from pipelines.servers.machine import find_api
from stages.runner.recipe import Recipe, load_recipe


def undeploy_recipe(wanted: str, store: Store, others: bool, console: Console) -> None:
    """Remove what is deployed of a recipe, given by its file or by the name that it is deployed under.

    Raises:
        NotThere, RecipeError, ServerError: with one line that says what to do.
    """
    recipe: Recipe | str = load_recipe(wanted) if Path(wanted).is_file() or "://" in wanted else wanted
    address = find_api(state_folder(store))
    os.environ.update(QUIET_PREFECT)
    from pipelines.servers.withdrawal import undeploy

    with server_errors(address):
        done = undeploy(recipe, store, others)
    for name in [*done.deployments, *(f"trigger {name}" for name in done.triggers)]:
        console.print(f"{name}: removed", soft_wrap=True)
    if done.gpus:
        console.print("gpus: the limit is removed, as no recipe that is deployed asks for one", soft_wrap=True)
    console.print(f"what it has made stays in {store.root}", soft_wrap=True)
