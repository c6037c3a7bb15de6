"""The servers of one store that `unidiffuser up` started, and recipes for them; the tests of a file share them."""

from __future__ import annotations

import re
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.dataset import find
from infra.processes import Server, recorded
from infra.store import Store
from stages.runner.graph import plan
from stages.runner.recipe import load_recipe
from tests.pipelines.conftest import ask, start

TINY = """
name: tiny
subsets:
  good: {select: {metadata: [metadata/*.parquet], min_width: 256}}
  more: {from: good-select, download: {}}
deploy:
  schedules: [{cron: "0 2 * * *", timezone: Europe/Berlin, until: good-select}]
  tags: [trial]
  gpus: 4
"""
# Every few seconds, over files that grow; what it commits starts the next recipe.
NIGHTLY = """
name: nightly
subsets:
  grown: {select: {metadata: [grown/*.parquet], min_width: 256}}
deploy: {schedules: [{interval: 8}]}
"""
AFTER = """
name: after
subsets:
  grown: {select: {metadata: [grown/*.parquet], min_width: 256}}
deploy: {after: [{recipe: nightly, node: grown-select}]}
"""


@dataclass
class Machine:
    """The servers of one store, and a client of their Prefect API."""

    folder: Path
    store: Path
    address: str
    printed: str

    def api(self, method: str, path: str, body: Any = None) -> Any:
        for attempt in range(20):
            try:
                return ask(self.store, method, path, body)
            except urllib.error.HTTPError as error:
                # SQLite: two transactions met. Prefect's own client asks again too.
                if error.code != 503:
                    raise
                time.sleep(0.1 * attempt)
        raise AssertionError(f"{path}: the Prefect server is busy all the time")

    def server(self, name: str) -> Server:
        found = recorded(name, self.store / ".state")
        assert found is not None, f"{name} is not running"
        return found

    def recipe(self, text: str) -> Path:
        name = re.search("name: (.+)", text)
        assert name is not None
        path = self.folder / f"{name[1]}.yaml"
        path.write_text(text)
        return path

    def deploy(self, text: str) -> str:
        code, printed = start("deploy", self.recipe(text), "--store", self.store).finish()
        assert code == 0, printed
        return printed

    def deployment(self, name: str) -> Any:
        return self.api("GET", f"deployments/name/{name}")

    def begin(self, name: str, state: dict[str, Any] | None = None, **parameters: Any) -> str:
        body = {"parameters": parameters, **({"state": state} if state else {})}
        return str(self.api("POST", f"deployments/{self.deployment(name)['id']}/create_flow_run", body)["id"])

    def runs(self, name: str) -> list[Any]:
        mine = {"deployments": {"name": {"any_": [name]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return [run for run in self.api("POST", "flow_runs/filter", mine) if run["start_time"]]

    def states(self, run: str) -> list[str]:
        states = self.api("GET", f"flow_run_states/?flow_run_id={run}")
        return [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]

    def end(self, run: str) -> tuple[str, str]:
        """Type and message of the state in which a run ends."""
        state = wait_for(lambda: (s := self.api("GET", f"flow_runs/{run}")["state"])["type"] in ENDS and s)
        return state["type"], state["message"]

    def rows(self, text: str, node: str, *overrides: str) -> int:
        store = Store(str(self.store))
        planned = plan(load_recipe(self.recipe(text), overrides), store)[node]
        dataset = find(store, planned.stage, planned.fingerprint)
        assert dataset is not None, f"{node} is not committed"
        return dataset.manifest.stats.rows_out


ENDS = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


def wait_for(question: Callable[[], Any], seconds: float = 240.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)
    return answer
