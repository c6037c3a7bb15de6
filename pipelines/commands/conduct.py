"""A recipe from plan to closing table: servers up, flow, servers down. What `run` and `demo` have in common."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import TYPE_CHECKING, Any

from rich.console import Console

from infra.external import state_folder
from infra.processes import ServerError
from infra.ray_jobs import RayJobs
from infra.store import Store
from pipelines.commands.preflight import chain_lines, check_plan, check_store
from pipelines.commands.terminal import TerminalView, closing_table, funnel_table, plan_table
from pipelines.flows.jobs import tidy
from pipelines.flows.parameters import Choice
from pipelines.flows.run import Outcome, Run, plan_run
from pipelines.flows.selection import check_inputs, select_nodes
from pipelines.servers.machine import command_for, find_machine, say_address, say_sign_in
from pipelines.servers.servers import Servers, use_servers
from stages.runner.graph import Planned
from stages.runner.recipe import Recipe

if TYPE_CHECKING:
    # Prefect reads its settings when it is first imported, and that must wait until a server is chosen.
    from prefect.states import State

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

    def choice(self) -> Choice:
        return Choice(only=list(self.only), start=self.start, until=self.until, force=list(self.force))


def dry_run(recipe: Recipe, store: Store, wish: Wish, console: Console) -> list[dict[str, Any]]:
    """Print what a run would do, return it as JSON, and say what stands in its way.

    Raises:
        RecipeError, StageError, StoreError, ServerError: what a run would be refused for.
    """
    check_store(store, write=False)
    planned, nodes = foresee(recipe, store, wish), select_nodes(recipe, wish.only, wish.start, wish.until)
    console.print(plan_table(planned, nodes))
    for line in chain_lines(store, planned, nodes):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    check_plan(recipe, store, planned, nodes)
    return [
        {"node": node, "stage": plan.stage, "fingerprint": plan.fingerprint, "state": plan.state, "reasons": plan.reasons}
        for node in nodes
        if (plan := planned[node])
    ]


def foresee(recipe: Recipe, store: Store, wish: Wish) -> dict[str, Planned]:
    """The plan; a forced node is shown as such without beginning its new generation."""
    told = {node for wanted in wish.force for node in recipe.select(wanted)}
    forced = set(told)
    planned: dict[str, Planned] = {}
    for name, node in plan_run(recipe, store).items():
        reasons = ["forced"] if name in forced else []
        reasons += [f"input {key} ({n}) is forced" for key, n in node.input_nodes.items() if n in forced]
        if reasons:
            forced.add(name)
            # A forced chain is begun anew: nobody need be warned of that.
            node = changed(
                node,
                generation=node.generation + (name in told),
                state="stale" if node.state == "hit" else node.state,
                reasons=[*node.reasons, *reasons],
            )
        planned[name] = node
    return planned


def summary(run: Run) -> dict[str, Any]:
    """What came of a run, as JSON: a dictionary a node."""
    nodes = []
    for node in run.nodes:
        outcome, stats = run.outcomes.get(node, Outcome(node, "not run")), None
        if outcome.dataset is not None:
            stats = outcome.dataset.manifest.stats
        nodes.append(
            {
                "node": node,
                "stage": run.planned[node].stage,
                "fingerprint": run.planned[node].fingerprint,
                "result": outcome.result,
                "message": outcome.message or None,
                "seconds": round(outcome.seconds, 2),
                "rows_in": stats.rows_in if stats else None,
                "rows_out": stats.rows_out if stats else None,
                "dropped": stats.dropped if stats else None,
                "where": outcome.dataset.where if outcome.dataset else None,
            }
        )
    return {"recipe": run.recipe.name, "flow_run": run.flow_run, "nodes": nodes}


def run_recipe(recipe: Recipe, store: Store, wish: Wish, console: Console, at_end: Callable[[Run], None] | None = None) -> int:
    """Run a recipe under Prefect and Ray; returns the exit code: 0, 1 when a node failed, 130 when it was interrupted.

    Where `unidiffuser up` keeps the servers, the run is one of the recipe's deployment, and this command follows it.

    Raises:
        RecipeError, StageError, StoreError, ServerError: before anything ran, with one line that says what to do.
    """
    recipe.check_named()
    nodes = select_nodes(recipe, wish.only, wish.start, wish.until)
    check_store(store)
    planned = foresee(recipe, store, wish)
    check_inputs(planned, nodes)
    check_plan(recipe, store, planned, nodes)
    if (address := find_machine(state_folder(store))) is not None:
        return run_deployed(recipe, store, planned, nodes, wish, address, console, at_end)
    if wish.force:
        planned = plan_run(recipe, store, wish.force)
    with use_servers(state_folder(store)) as servers:
        address = servers.begin_prefect()
        say_address(servers.state, address, console)
        with TerminalView(console) as view:
            run = Run(recipe, store, planned, nodes, servers, view, wish.jobs)
            state = conduct(run, wish)
        _show_end(run, state, console)
        if at_end is not None:
            at_end(run)
        _say_where(run, address, wish, console)
    if run.failures():
        return 1
    return 130 if run.stopping.is_set() else 0


def run_deployed(
    recipe: Recipe,
    store: Store,
    planned: dict[str, Planned],
    nodes: list[str],
    wish: Wish,
    address: str,
    console: Console,
    at_end: Callable[[Run], None] | None,
) -> int:
    """As `run_recipe`, by a worker: the run goes on when this command is killed, and the UI can retry it."""
    os.environ.update(QUIET_PREFECT)
    from pipelines.servers.follow import follow, start_run

    with server_errors(address), TerminalView(console) as view:
        run = Run(recipe, store, planned, nodes, Servers(state_folder(store)), view, wish.jobs)
        flow_run = start_run(run, wish.choice(), list(wish.overrides))
        page = f"{address}/v2/runs/flow-run/{flow_run}"
        console.print(f"This run in the Prefect UI: {page}", soft_wrap=True)
        say_sign_in(run.servers.state, address, console)
        state = follow(run, flow_run)
    _show_end(run, state, console)
    if at_end is not None:
        at_end(run)
    if state.is_completed():
        return 0
    return 130 if state.is_cancelled() else 1


@contextmanager
def server_errors(address: str) -> Iterator[None]:
    """A server that cannot be reached, or refuses, is one line."""
    from httpx import HTTPError

    try:
        yield
    except HTTPError as error:
        text = str(error).splitlines()
        raise ServerError(f"the Prefect server at {address}: {text[0] if text else type(error).__name__}") from error


def _show_end(run: Run, state: State[Any], console: Console) -> None:
    """The tables, and ``nothing new: all 11 nodes reused``; why a run failed has been said already."""
    stats = {node: o.dataset.manifest.stats for node in run.nodes if (o := run.outcomes.get(node)) and o.dataset}
    console.print(closing_table(run))
    if stats:
        console.print("", funnel_table(run.recipe, stats), "")
    if state.is_completed() and state.message:
        console.print(state.message)


def conduct(run: Run, wish: Wish) -> State[Any]:
    """Bring up what the run needs and run its flow; Prefect is imported while its server starts."""
    if run.needs_ray:
        run.servers.begin_ray(lambda ray: _tidy(ray, run))
    os.environ.update(QUIET_PREFECT)
    from pipelines.flows.flow import run_flow

    run.servers.wait_for_prefect()
    return run_flow(run, wish.choice(), list(wish.overrides))


def _tidy(ray: RayJobs, run: Run) -> None:
    def say(level: int, text: str) -> None:
        logging.getLogger("pipelines").log(level, text)
        run.view.said("ray", level, text)

    tidy(ray, run, say)


def _say_where(run: Run, address: str, wish: Wish, console: Console) -> None:
    """How to see the run in the UI: now when the server stays up, else with the command that brings it back."""
    page = f"{address}/v2/runs/flow-run/{run.flow_run}"
    if not run.servers.embedded_prefect:
        console.print(f"This run in the Prefect UI: {page}", soft_wrap=True)
    elif wish.keep and not run.stopping.is_set():
        console.print(f"This run in the Prefect UI: {page}", soft_wrap=True)
        console.print("Ctrl-C stops the servers.")
        _wait_for_signal()
    else:
        up = command_for("up", run.servers.state)
        console.print(f"`{up}` shows this run and those before it in the Prefect UI: {page}", soft_wrap=True)


def _wait_for_signal() -> None:
    # Ctrl-C ends the waiting and nothing else: the run is over and well. Handlers, since a shell may have it ignored.
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(1.0):
        pass
