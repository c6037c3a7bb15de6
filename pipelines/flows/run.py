"""One run of a recipe: what it is about, what came of each node so far, and whether it is to stop. Knows no Prefect."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from infra.dataset import Dataset
from infra.queries import unsigned
from infra.store import Store
from pipelines import DEBUG
from pipelines.servers.servers import Servers
from stages.runner.contract import digest_of
from stages.runner.graph import Planned, outside_of, plan
from stages.runner.recipe import Recipe

Result = Literal["reused", "made", "failed", "stopped", "not run"]


@dataclass(frozen=True)
class Outcome:
    """What came of a node; `seconds` are of this run, the manifest has those of the making."""

    node: str
    result: Result
    seconds: float = 0.0
    dataset: Dataset | None = None
    message: str = ""


class View(Protocol):
    """Whoever watches a run: the terminal, or nobody."""

    def started(self, node: str) -> None: ...

    def progress(self, node: str, fields: dict[str, Any]) -> None: ...

    def said(self, node: str, level: int, text: str) -> None: ...

    def finished(self, outcome: Outcome) -> None: ...


@dataclass
class Run:
    """A recipe on its way: the plan, the servers, and the outcomes by node.

    `jobs` bounds how many nodes work at a time: on a small machine two of them are slower side by side than in turn. With `debug`
    the log of a job that fails holds the traceback of any error.
    """

    recipe: Recipe
    store: Store
    planned: dict[str, Planned]
    nodes: list[str]
    servers: Servers
    view: View
    jobs: int = 1
    stopping: threading.Event = field(default_factory=threading.Event)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    flow_run: str | None = None
    debug: bool = field(default_factory=lambda: DEBUG in os.environ)
    # By node: the id of its Ray job, and of the artifact that shows its dataset (`NODE-training`: its losses as they come).
    job_ids: dict[str, str] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.turn = threading.BoundedSemaphore(self.jobs)

    @property
    def needs_ray(self) -> bool:
        return any(self.planned[node].state != "hit" for node in self.nodes)

    def finish(self, outcome: Outcome) -> None:
        self.outcomes[outcome.node] = outcome
        self.view.finished(outcome)

    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes.values() if outcome.result == "failed"]


def snapshot(recipe: Recipe, store: Store) -> str:
    """The recipe's document after all overrides, as a file in the store that jobs and deployments read; returns its address.

    Named by content, so runs share it.
    """
    # In the order of the file: a subset may start from one before it. Not in escapes, which YAML reads otherwise than JSON.
    whole = {**unsigned(recipe.document), "folder": str(recipe.folder)}
    document = json.dumps(whole, indent=1, default=str, ensure_ascii=False)
    path = f".state/recipes/{recipe.name}-{digest_of(document)[:12]}.json"
    if not store.exists(path):
        store.write(path, document.encode())
    return store.url(path)


def pinned(run: Run) -> str:
    """What the run found outside the store when it was planned, as a file that its jobs read; returns its address."""
    found = outside_of(run.planned)
    path = f".state/outside/{hashlib.sha256(found).hexdigest()[:24]}.parquet"
    if not run.store.exists(path):
        run.store.write(path, found)
    return run.store.url(path)


def plan_run(recipe: Recipe, store: Store, force: Sequence[str] = ()) -> dict[str, Planned]:
    """Plan a recipe; `force` takes nodes and stage names.

    Raises:
        RecipeError: a file or a forced node does not exist.
    """
    return plan(recipe, store, frozenset(node for wanted in force for node in recipe.select(wanted)))
