"""The training histories that an evaluation is given."""

from __future__ import annotations

import json
from typing import Any

from stages.runner.contract import Job


def histories(job: Job) -> dict[str, list[dict[str, Any]]]:
    """Training history by node, from the checkpoints of all training stages."""
    found = {}
    for name, dataset in job.inputs.items():
        if name.startswith("history."):
            lines = job.store.read(dataset.file("history.jsonl").path).decode().splitlines()
            found[name.removeprefix("history.")] = [json.loads(line) for line in lines]
    return found
