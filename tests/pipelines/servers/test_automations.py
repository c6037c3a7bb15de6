"""What the server waits for after each thing that a run may have said last, by Prefect's own reading of the triggers."""

from __future__ import annotations

import pytest
from prefect.server.events.schemas.automations import EventTrigger

from pipelines.servers.automations import DEAD_RUNS, RETRY, UNBEGUN

LAST = {
    "Pending": UNBEGUN, "Submitting": UNBEGUN, "Running": DEAD_RUNS, "heartbeat": DEAD_RUNS, "Crashed": RETRY,
    "Scheduled": None, "AwaitingRetry": None, "Completed": None, "Failed": None, "Cancelled": None,
}  # fmt: skip


@pytest.mark.parametrize("last", LAST)
def test_whatever_a_run_said_last_one_automation_waits_for_more_until_it_has_ended(last: str) -> None:
    waiting = []
    for automation in (DEAD_RUNS, RETRY, UNBEGUN):
        trigger = EventTrigger.model_validate(automation.trigger.model_dump(mode="json"))
        waiting += [automation] * trigger.starts_after(f"prefect.flow-run.{last}")
    assert waiting == ([LAST[last]] if LAST[last] else [])
