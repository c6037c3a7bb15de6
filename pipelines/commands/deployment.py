"""`unidiffuser deploy` and `undeploy` as a person sees them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from infra.external import state_folder
from infra.store import Store
from pipelines.commands.conduct import QUIET_PREFECT, server_errors
from pipelines.commands.preflight import check_plan, check_store
from pipelines.flows.run import plan_run
from pipelines.servers.machine import find_api, say_sign_in
from stages.runner.deployment import Schedule
from stages.runner.recipe import Recipe, RecipeError, load_recipe


def deploy_recipe(recipe: Recipe, store: Store, state: Path, console: Console, replace: bool = False) -> dict[str, Any]:
    """Register a recipe on the server that `unidiffuser up` keeps or PREFECT_API_URL names, and say what is there now.

    Args:
        replace: although the name is another recipe file's or another store's.

    Returns:
        What a script would read.

    Raises:
        RecipeError, ServerError: with one line that says what to do.
    """
    recipe.check_named()
    check_store(store)
    address = find_api(state)
    try:
        check_plan(recipe, store, plan_run(recipe, store), list(recipe.nodes), refuse=False)
    except RecipeError as error:
        # Files may come later than the deployment that will look for them.
        print(f"warning: {error}", file=sys.stderr)
    os.environ.update(QUIET_PREFECT)
    from pipelines.servers.deployments import deploy
    from pipelines.servers.schedules import next_dates

    with server_errors(address):
        done = deploy(recipe, store, replace)
    pages = {name: f"{address}/v2/deployments/deployment/{deployment}" for name, deployment in done.deployments.items()}
    for name, page in pages.items():
        console.print(f"{name}: {page}", soft_wrap=True)
    for name in done.removed:
        console.print(f"{name}: removed, as the recipe has no such node any more", soft_wrap=True)
    schedules = []
    for number, (schedule, there) in enumerate(zip(recipe.deploy.schedules, done.schedules, strict=True)):
        words = describe_schedule(schedule.model_copy(update={"active": there.active}))
        dates = next_dates(there) if there.active and not done.paused else []
        schedules.append({"schedule": words, "next": [date.isoformat() for date in dates]})
        if dates:
            words += f"; next {', '.join(f'{date:%Y-%m-%d %H:%M}' for date in dates)}"
        console.print(f"schedule {number}: {words}", soft_wrap=True)
    if done.gpus is not None:
        words = f"gpus: the server has {done.gpus} slots, as somebody else has set them, and not {recipe.deploy.gpus}"
        console.print(words, soft_wrap=True)
    if done.paused:
        console.print(
            "paused: somebody has paused this deployment; no schedule starts it until it is resumed in the UI",
            soft_wrap=True,
        )
    say_sign_in(state, address, console)
    return {"recipe": done.recipe, "deployments": pages, "removed": done.removed, "schedules": schedules, "paused": done.paused}


def describe_schedule(schedule: Schedule) -> str:
    """``cron 0 2 * * * (Europe/Berlin), until little-encode``"""
    kind = next(kind for kind in ("cron", "interval", "rrule") if getattr(schedule, kind) is not None)
    chosen = {"only": ", ".join(schedule.only), "from": schedule.start, "until": schedule.until}
    parts = [f"{kind} {getattr(schedule, kind)} ({schedule.timezone})"]
    parts += [f"{name} {nodes}" for name, nodes in chosen.items() if nodes]
    return ", ".join(parts if schedule.active else [*parts, "switched off"])


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
