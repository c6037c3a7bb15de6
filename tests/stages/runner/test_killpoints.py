"""A run that is killed at a named point: the same command again gives what an undisturbed one gives, and hardly works twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.dataset import find, verify
from infra.store import Store
from tests.stages.killpoints import ALONE, TOGETHER

ROOT = Path(__file__).parent.parent.parent.parent
# Three numbers and what is kept of them.
UNITS = 6


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_each_is_hit_and_recovered_from(kind, tmp_path, bucket, digests):
    place = str(tmp_path / "stores") if kind == "disk" else f"{bucket}/killed"
    command = [sys.executable, "-m", "tests.stages.killpoints", str(tmp_path / "work"), place]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    codes = {point: found["codes"] for point, found in said.items()}
    # The dead one, the one beside it, the one that came later.
    assert codes == {"undisturbed": [0]} | dict.fromkeys(ALONE, [-9, 0]) | dict.fromkeys(TOGETHER, [-9, 0, 0])
    done = {point: found["units"] for point, found in said.items()}
    assert done.pop("undisturbed") == UNITS and set(done.values()) <= {UNITS, UNITS + 1}
    assert done["in the manifest"] == UNITS and all(done[point] == UNITS for point in TOGETHER)
    datasets = {point: find(Store(found["store"]), "squares", "f" * 24) for point, found in said.items()}
    truth = digests(datasets["undisturbed"])
    for point, dataset in datasets.items():
        assert digests(dataset) == truth and verify(dataset) == [], point
