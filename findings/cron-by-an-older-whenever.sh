#!/usr/bin/env bash
# prefect 3.9.1 with whenever 0.10.5, which its requirements admit (>=0.10.5,<0.12), under Python 3.11 or 3.12
# Behaviour: the server finds no date of any cron schedule. Its own clock gives times in pendulum's zones there, which this
#   whenever does not take (0.11.0 does): asking a schedule for its dates raises. Interval and recurrence rules have theirs.
# Why it matters: an upgrade of Prefect alone keeps the whenever that is installed or locked. The scheduler asks for these
#   same dates, so a nightly deployment has no run to come.
# Seen: whenever 0.10.5: cron: ValueError, "tzinfo must be of type ZoneInfo (exactly), got Timezone('Europe/Berlin')"; interval: 3 dates;
#   rrule: 3 dates. whenever 0.11.0: 3 dates each.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PREFECT_HOME="$folder/prefect"
for version in 0.10.5 0.11.0; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check prefect==3.9.1 "whenever==$version" fastapi==0.150.0 sqlalchemy==2.0.58
    "$folder/venv/bin/python" -W ignore - "$version" <<'PYTHON'
import asyncio
import sys
from datetime import timedelta

from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule

schedules = {
    "cron": CronSchedule(cron="0 2 * * *", timezone="Europe/Berlin"),
    "interval": IntervalSchedule(interval=timedelta(days=1), timezone="Europe/Berlin"),
    "rrule": RRuleSchedule(rrule="FREQ=DAILY", timezone="Europe/Berlin"),
}
seen = {}
for kind, schedule in schedules.items():
    try:
        seen[kind] = f"{len(asyncio.run(schedule.get_dates(3)))} dates"
    except ValueError as error:
        seen[kind] = f"ValueError: {error}"
    print(f"whenever {sys.argv[1]}, {kind}: {seen[kind]}")
words = [said.split(":")[0] for said in seen.values()]
same = words == ["ValueError" if sys.argv[1] == "0.10.5" else "3 dates", "3 dates", "3 dates"]
print("as described" if same else "CHANGED")
sys.exit(not same)
PYTHON
done
