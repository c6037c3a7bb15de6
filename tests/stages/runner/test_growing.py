"""A cluster that grows from nothing, by Ray's own autoscaler: machines of the kind that is named come, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.stages.growing import ALONE

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="it takes process ids of its own, which is root's to do")
def test_machines_of_the_kind_that_a_stage_or_a_training_names_come_from_nothing() -> None:
    # Ray's sockets lie below it, whose paths must be short.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [*ALONE, sys.executable, "-m", "tests.stages.growing", folder]
        said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        assert said.returncode == 0, said.stderr[-3000:]
        told = json.loads(said.stdout.splitlines()[-1])
    assert told["there"] == 0 and told["may_come"] == [2, 4, 6]
    assert told["for_the_stage"] == [True, False], "no machine of the other kind has come"
    assert (told["workers"], told["for_training"]) == (4, 4)
    assert (
        "has the resource tpu-machine; start one" in told["missing"] and "name one of cpu-machine, gpu-machine" in told["missing"]
    )
