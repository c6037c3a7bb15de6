"""A recipe that is deployed again leaves what somebody has set on the server; and schedules that never come are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import temporary_settings
from rich.console import Console

from infra.store import Store
from pipelines.commands import deployment
from pipelines.servers import automations, schedules
from pipelines.servers.deployments import deploy
from pipelines.servers.schedules import next_dates, prefect_schedules
from stages.runner.recipe import Recipe, RecipeError, parse_recipe
from tests.pipelines.conftest import Kept, ask

WEEKLY, NIGHTLY = {"interval": 7 * 86400}, {"cron": "0 2 * * *", "timezone": "Europe/Berlin"}


def recipe(folder: Path, *wanted: dict[str, Any], subsets: tuple[str, ...] = ("a",), **section: Any) -> Recipe:
    (folder / "a.parquet").touch()
    document = {
        "name": "weekly",
        "subsets": {name: {"select": {"metadata": ["a.parquet"]}} for name in subsets},
        "deploy": {"schedules": list(wanted), **section},
    }
    return parse_recipe(document, folder)


@pytest.fixture
def api(kept: Kept) -> Iterator[Callable[..., Any]]:
    """The API of the server of `kept`, which is left as it was."""

    def api(method: str, path: str, body: Any = None) -> Any:
        return ask(kept.store, method, path, body)

    with temporary_settings(kept.settings()):
        yield api
    for found in api("POST", "deployments/filter", {}):
        api("DELETE", f"deployments/{found['id']}")
    for automation in api("POST", "automations/filter", {}):
        api("DELETE", f"automations/{automation['id']}")
    for limit in api("POST", "v2/concurrency_limits/filter", {}):
        api("DELETE", f"v2/concurrency_limits/{limit['name']}")
    for pool in api("POST", "work_pools/filter", {}):
        api("DELETE", f"work_pools/{pool['name']}")


def test_deploying_again_leaves_what_was_changed_on_the_server(
    api: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "store"))
    after = [{"recipe": "other", "node": "b-select"}]

    def whole() -> Any:
        return api("GET", "deployments/name/recipe/weekly")

    def by_slug() -> dict[str, Any]:
        return {schedule["slug"]: schedule for schedule in whole()["schedules"]}

    def automation(name: str) -> Any:
        return next(one for one in api("POST", "automations/filter", {}) if name in one["name"])

    first = recipe(tmp_path, WEEKLY, NIGHTLY, subsets=("a", "b"), after=after, gpus=4, tags=["mine", "old"])
    deploy(first, store)
    before, mine = by_slug(), f"deployments/{whole()['id']}"
    api("PATCH", f"{mine}/schedules/{before['schedule-1']['id']}", {"active": False})
    api("POST", f"{mine}/schedules", [{"schedule": {"cron": "0 5 1 1 *"}, "active": True}])
    api("PATCH", mine, {"tags": [*whole()["tags"], "added"], "concurrency_limit": 2})
    api("POST", f"{mine}/pause_deployment", {})
    api("PATCH", "v2/concurrency_limits/gpu", {"limit": 0})
    api("PATCH", "work_pools/local", {"is_paused": True, "concurrency_limit": 3})
    for name in ("start crashed", "weekly after other"):
        api("PATCH", f"automations/{automation(name)['id']}", {"enabled": False})
    node = api("GET", "deployments/name/node/weekly-b-select")
    copied = {name: node[name] for name in ("flow_id", "tags", "parameters", "entrypoint")}
    api("POST", "deployments/", {"name": "copy-of-b", **copied})

    # Another one comes before them, a node goes, and an automation is another one in this release.
    monkeypatch.setattr(automations, "RETRY", automations.RETRY.model_copy(update={"description": "renewed"}))
    hourly = {"interval": 3600}
    done = deploy(recipe(tmp_path, hourly, WEEKLY, NIGHTLY, after=after, gpus=4, tags=["mine"]), store)
    assert done.removed == ["weekly-b-select"] and api("GET", "deployments/name/node/copy-of-b")
    now = by_slug()
    assert set(now) == {"schedule-0", "schedule-1", "schedule-2", None}
    assert [now[slug]["active"] for slug in ("schedule-0", "schedule-1", "schedule-2", None)] == [True, True, False, True]
    assert now["schedule-1"]["schedule"] == before["schedule-0"]["schedule"], "the week begins anew"
    assert now[None]["schedule"]["cron"] == "0 5 1 1 *"
    assert [schedule.active for schedule in done.schedules] == [True, True, False] and done.paused
    assert whole()["paused"] and whole()["global_concurrency_limit"]["limit"] == 2
    assert {"mine", "added"} <= set(whole()["tags"]) and "old" not in whole()["tags"]
    assert api("GET", "v2/concurrency_limits/gpu")["limit"] == 0
    pool = api("GET", "work_pools/local")
    assert pool["is_paused"] and pool["concurrency_limit"] == 3
    assert automation("start crashed")["description"] == "renewed"
    assert not automation("start crashed")["enabled"] and not automation("weekly after other")["enabled"]

    # What the recipe changes counts: another time (asleep as it was), another number of slots, and a switch of its own.
    later = {**NIGHTLY, "cron": "0 3 * * *"}
    deploy(recipe(tmp_path, {**hourly, "active": False}, WEEKLY, later, gpus=2), store)
    now = by_slug()
    assert [now[f"schedule-{number}"]["active"] for number in range(3)] == [False, True, False]
    assert now["schedule-2"]["schedule"]["cron"] == "0 3 * * *" and api("GET", "v2/concurrency_limits/gpu")["limit"] == 2
    deploy(recipe(tmp_path), store)
    assert set(by_slug()) == {None}, "a schedule that the recipe has no more is still there"


def test_only_what_will_start_is_said_to_come(
    kept: Kept, api: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "find_api", lambda _: kept.address)
    monkeypatch.setattr(deployment, "QUIET_PREFECT", {})
    wanted = recipe(tmp_path, NIGHTLY, {**NIGHTLY, "active": False}, gpus=1)

    told: list[dict[str, Any]] = []

    def said() -> list[str]:
        told.append(deployment.deploy_recipe(wanted, Store(str(tmp_path / "store")), tmp_path / "state", Console(width=200)))
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("weekly")]

    awake, asleep = said()
    assert "; next 2" in awake and asleep.endswith("switched off")
    api("POST", f"deployments/{api('GET', 'deployments/name/recipe/weekly')['id']}/pause_deployment", {})
    *paused, why = said()
    assert paused == [awake.partition("; next")[0], asleep] and why.startswith("paused: ")
    # A script reads the same.
    assert [[len(each["next"]) for each in one["schedules"]] for one in told] == [[3, 0], [0, 0]]
    assert [one["paused"] for one in told] == [False, True] and set(told[0]["deployments"]) == {"weekly", "weekly-a-select"}


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            {"cron": "0 0 30 2 *"},
            r"^deploy\.schedules\.0\.cron: 0 0 30 2 \* has no next date .* has such a day$",
        ),
        ({"rrule": "FREQ=DAILY;COUNT=5"}, r"^deploy\.schedules\.0\.rrule: .* has no next date .* COUNT counts from DTSTART"),
        ({"rrule": "FREQ=DAILY;UNTIL=20210101T000000"}, r"^deploy\.schedules\.0\.rrule: .* has no next date"),
        ({"rrule": "DTSTART:20210101T000000\nRRULE:FREQ=DAILY;COUNT=2"}, r"^deploy\.schedules\.0\.rrule: .* has no next date"),
        ({"interval": 1e12}, r"^deploy\.schedules\.0\.interval: .*it is too long"),
    ],
)
def test_a_schedule_that_never_comes_is_refused(schedule: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        prefect_schedules(recipe(tmp_path, schedule))
    assert "\n" not in str(refused.value)


def test_an_rrule_that_ends_in_utc_is_refused_when_the_recipe_is_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^deploy\.schedules\.0\.rrule: UNTIL ends with Z.* leave out the Z"):
        recipe(tmp_path, {"rrule": "FREQ=DAILY;UNTIL=20990101T000000Z"})


def test_a_rule_whose_dates_take_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "PATIENCE", 0.0)
    with pytest.raises(RecipeError, match="no next date that could be found"):
        prefect_schedules(recipe(tmp_path, {"rrule": "FREQ=HOURLY"}))


def test_the_next_dates_are_those_of_the_calendar(tmp_path: Path) -> None:
    yearly, soon = prefect_schedules(recipe(tmp_path, {"cron": "30 6 1 1 *"}, {"interval": 60}))
    year = datetime.now(UTC).year
    assert next_dates(yearly) == [datetime(year + n, 1, 1, 6, 30, tzinfo=UTC) for n in (1, 2, 3)]
    first, second, _ = next_dates(soon)
    assert timedelta(0) < first - datetime.now(UTC) < timedelta(minutes=1) and second - first == timedelta(minutes=1)
