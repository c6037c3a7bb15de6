"""Stages on clusters that lose nodes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from stages.filter.stage import Filter
from tests.stages.nodes import CONFIG
from tests.stages.packed import blots, download, encoded, sample

ROOT = Path(__file__).parent.parent.parent.parent


def test_what_a_lost_node_was_at_is_done_by_those_that_stay(tmp_path, store, make, in_process):
    """Of a cluster that has no place at first; the files are those of a run in one process."""
    chance = random.Random(5)
    shards = [[sample(number, encoded(blots(chance)))] for number in range(4)]
    truth = make(Filter, store, {"rows": download(store, shards)}, **CONFIG)
    other = type(store)(str(tmp_path / "other"))
    download(other, shards)
    command = [sys.executable, "-m", "tests.stages.nodes", other.root]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    (said,) = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert json.loads(said) == {entry.name: entry.sha256 for entry in truth.files}
    assert "is tried again in 2 s: " in result.stderr and "set aside" not in result.stderr
