"""A recipe from plan to closing table: servers up, flow, servers down. What `run` and `demo` have in common."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from infra.external import state_folder
from infra.ray_jobs import RayJobs
from infra.store import Store
from pipelines.jobs import stop_orphans
from pipelines.run import Run, plan_run
from pipelines.selection import check_inputs, select_nodes
from pipelines.servers import use_servers
from pipelines.terminal import TerminalView, closing_table, plan_table
from stages.graph import Planned
from stages.recipe import Recipe

# Prefect shows every log line on the console as well; there it would bury ours. The UI has them all.
QUIET_PREFECT = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}


@dataclass(frozen=True)
class Wish:
    """What the person at the command asked for."""

    only: Sequence[str] = ()
    start: str | None = None
    until: str | None = None
    force: Sequence[str] = ()
    overrides: Sequence[str] = ()
    jobs: int = 1
    keep: bool = False


def dry_run(recipe: Recipe, store: Store, wish: Wish, console: Console) -> None:
    """Print what a run would do; a forced node is shown as such without beginning its new generation."""
    forced = {node for wanted in wish.force for node in recipe.select(wanted)}
    planned: dict[str, Planned] = {}
    for name, node in plan_run(recipe, store).items():
        reasons = ["forced"] if name in forced else []
        reasons += [f"input {key} ({n}) is forced" for key, n in node.input_nodes.items() if n in forced]
        if reasons:
            forced.add(name)
            node = replace(node, state="stale" if node.state == "hit" else node.state, reasons=[*node.reasons, *reasons])
        planned[name] = node
    console.print(plan_table(planned, select_nodes(recipe, wish.only, wish.start, wish.until)))


def run_recipe(recipe: Recipe, store: Store, wish: Wish, console: Console, at_end: Callable[[Run], None] | None = None) -> int:
    """Run a recipe under Prefect and Ray; returns the exit code: 0, 1 when a node failed, 130 when it was interrupted.

    Raises:
        RecipeError, StageError, StoreError, ServerError: before anything ran, with one line that says what to do.
    """
    nodes = select_nodes(recipe, wish.only, wish.start, wish.until)
    planned = plan_run(recipe, store, wish.force)
    check_inputs(planned, nodes)
    with use_servers(state_folder(store)) as servers:
        address = servers.begin_prefect()
        with TerminalView(console) as view:
            run = Run(recipe, store, planned, nodes, servers, view, wish.jobs)
            conduct(run, wish)
        console.print(closing_table(run))
        if at_end is not None:
            at_end(run)
        _say_where(run, address, wish, console)
    if run.failures():
        return 1
    return 130 if run.stopping.is_set() else 0


def conduct(run: Run, wish: Wish) -> None:
    """Bring up what the run needs and run its flow; Prefect is imported while its server starts."""
    if run.needs_ray:
        run.servers.begin_ray(lambda ray: _stop_orphans(ray, run))
    os.environ.update(QUIET_PREFECT)
    from pipelines.flow import run_flow

    run.servers.wait_for_prefect()
    run_flow(run, list(wish.overrides), list(wish.force))


def _stop_orphans(ray: RayJobs, run: Run) -> None:
    def say(level: int, text: str) -> None:
        logging.getLogger("pipelines").log(level, text)
        run.view.said("ray", level, text)

    stop_orphans(ray, run.planned, say)


def _say_where(run: Run, address: str, wish: Wish, console: Console) -> None:
    """How to see the run in the UI: now when the server stays up, else with the command that brings it back."""
    page = f"{address}/v2/runs/flow-run/{run.flow_run}"
    if not run.servers.embedded_prefect:
        console.print(f"This run in the Prefect UI: {page}", soft_wrap=True)
    elif wish.keep and not run.stopping.is_set():
        console.print(f"This run in the Prefect UI: {page}\nCtrl-C stops the servers.", soft_wrap=True)
        _wait_for_signal()
    else:
        console.print(
            f"This run is kept in {run.servers.state}/prefect; to see it in the Prefect UI, run the same command with --keep "
            f"(everything is reused) and open /v2/runs/flow-run/{run.flow_run}",
            soft_wrap=True,
        )


def _wait_for_signal() -> None:
    # Ctrl-C ends the waiting and nothing else: the run is over and well. Handlers, since a shell may have it ignored.
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(1.0):
        pass
