"""`unidiffuser run --force NODE` with a real Prefect server and a real Ray, on the store of the first run of `tiny`."""

from __future__ import annotations

import re

import pytest

from infra.dataset import all_datasets
from infra.store import Store
from pipelines.flows.run import plan_run
from stages.runner.recipe import load_recipe
from tests.pipelines.conftest import Kept, start

pytestmark = pytest.mark.slow


def test_a_forced_node_is_made_again_as_a_generation_that_later_runs_reuse(kept: Kept) -> None:
    if kept.command.process.poll() is None:
        kept.close()
    store = Store(str(kept.store))
    (old,) = [dataset for dataset in all_datasets(store) if dataset.manifest.node == "good-select"]
    chosen = ("--only", "good-select", "--force", "good-select")
    code, printed = start("run", kept.recipe, *chosen, "--store", kept.store).finish()
    assert code == 0 and re.search(r"good-select made 44 rows", printed), printed
    planned = plan_run(load_recipe(kept.recipe), store)["good-select"]
    assert (planned.state, planned.generation) == ("hit", 1)
    (new,) = [d for d in all_datasets(store) if d.manifest.fingerprint == planned.fingerprint]
    assert new.manifest.fingerprint != old.manifest.fingerprint
    assert [entry.sha256 for entry in new.files] == [entry.sha256 for entry in old.files]
