#!/usr/bin/env bash
# prefect 3.8.8 (fastapi 0.150.0, sqlalchemy 2.0.58)
# Behaviour: a schedule with a recurrence rule that has a COUNT is accepted and has no date to come: without a DTSTART the rule
#   counts from 2020. One with an UNTIL in UTC, as the iCalendar standard asks, is accepted too, and asking it for its dates raises.
# Why it matters: a deployment with such a schedule is registered and shown as active, and never runs. A nightly training that
#   should end with the year does not begin.
# Seen: FREQ=DAILY;COUNT=10: no dates. FREQ=DAILY;UNTIL=20990101T000000Z: ValueError, "RRULE UNTIL values must be specified in UTC
#   when DTSTART is timezone-aware". FREQ=DAILY: three dates.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check prefect==3.8.8 fastapi==0.150.0 sqlalchemy==2.0.58
export PREFECT_HOME="$folder/prefect"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import asyncio
import sys

from prefect.client.schemas.schedules import RRuleSchedule as Given
from prefect.server.schemas.schedules import RRuleSchedule

seen = {}
for rule in ("FREQ=DAILY", "FREQ=DAILY;COUNT=10", "FREQ=DAILY;UNTIL=20990101T000000Z"):
    Given(rrule=rule, timezone="Europe/Berlin")  # what a deployment is created with: it accepts all three
    try:
        dates = asyncio.run(RRuleSchedule(rrule=rule, timezone="Europe/Berlin").get_dates(3))
        seen[rule] = f"{len(dates)} dates"
    except ValueError as error:
        seen[rule] = f"ValueError: {error}"
    print(f"{rule}: {seen[rule]}")
words = [said.split(":")[0] for said in seen.values()]
same = words == ["3 dates", "0 dates", "ValueError"]
print("as described" if same else "CHANGED")
sys.exit(not same)
PYTHON
