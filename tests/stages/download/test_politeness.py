"""How hosts are treated: connections at a time, pauses that they ask for, hosts that are dead, a shard that must be over."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from stages.download import politeness
from stages.download.fetch import FetchError, _retry_after, can_heal
from stages.download.network import Wait
from stages.download.politeness import Hosts, spread
from stages.download.stage import Download
from tests.stages.hostile_web import HOST, Handler, hostile_web
from tests.stages.pages import selector, table_of


@pytest.fixture
def web():
    with hostile_web() as place:
        yield place


@pytest.fixture
def select(tmp_path, make):
    return selector(tmp_path, make)


def statuses(dataset):
    table = table_of(dataset)
    return dict(zip(table["url"].to_pylist(), table["status"].to_pylist(), strict=True))


def test_no_more_connections_to_a_host_than_allowed_and_standing_in_line_costs_no_time():
    hosts = Hosts(2, 0)
    lock, inside, most = threading.Lock(), 0, 0
    ends: list[float] = []

    def work():
        nonlocal inside, most
        wait = Wait(1, time.monotonic() + 0.3)
        with hosts.turn("a.example", wait):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.1)
            ends.append(wait.end - time.monotonic())
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    with hosts.turn("b.example", Wait(1, time.monotonic() + 0.3)):
        pass
    for thread in threads:
        thread.join()
    assert most == 2
    assert len(ends) == 10 and min(ends) > 0, "the tenth waited half a second for its turn, and still has its own 0.3 seconds"


def test_a_host_that_is_silent_is_left_alone_and_the_others_are_not():
    hosts = Hosts(1, 3)

    def fails(name, reason):
        with pytest.raises(FetchError) as error, hosts.turn(name, Wait(1, time.monotonic() + 1)):
            raise FetchError(reason)
        return str(error.value)

    assert [fails("dead.example", "timeout") for _ in range(5)] == ["timeout"] * 3 + ["host_down"] * 2
    # Any answer, also a refusal, shows that somebody is there.
    answers = ["timeout", "connection", "http_404", "timeout", "dns", "http_503", "timeout", "timeout"]
    assert [fails("bad.example", reason) for reason in answers] == answers
    with hosts.turn("good.example", Wait(1, time.monotonic() + 1)):
        pass


def test_the_next_shard_leaves_a_silent_host_alone_and_asks_it_again_after_a_minute(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(politeness, "time", SimpleNamespace(monotonic=lambda: clock.now))
    hosts = Hosts(1, 2)
    answers: dict[str, str] = {"dead.example": "timeout", "gone.example": "http_404"}

    def ask(name):
        try:
            with hosts.turn(name, Wait(1, clock.now + 1)):
                if reason := answers.get(name):
                    raise FetchError(reason)
        except FetchError as error:
            return str(error)
        return "success"

    assert [ask("dead.example") for _ in range(3)] == ["timeout", "timeout", "host_down"]
    assert ask("gone.example") == "http_404"
    hosts.next_shard()
    assert list(hosts._hosts) == ["dead.example"], "what answers is not remembered: there are millions of it"
    clock.now = politeness.PROBE - 1
    assert ask("dead.example") == "host_down"
    clock.now = politeness.PROBE + 1
    assert [ask("dead.example") for _ in range(2)] == ["timeout", "host_down"], "one attempt, and not one a row"
    clock.now, answers["dead.example"] = 2 * politeness.PROBE + 2, ""
    assert [ask("dead.example") for _ in range(2)] == ["success", "success"]


def test_rows_of_a_dead_host_cost_a_few_timeouts_and_not_one_each(store, web, select, make, in_process):
    dead = [f"http://dead.example/{number}" for number in range(60)]
    names = [f"http://{HOST}/good-{number}" for number in range(20)]
    settings = {"timeout": 2.0, "retries": 0, "host_connections": 4, "host_failures": 4}
    Handler.silent.add("dead.example")
    try:
        dataset = make(Download, store, {"rows": select(store, dead + names)}, hosts={HOST: web, "dead.example": web}, **settings)
    finally:
        Handler.silent.clear()
    found = Counter(statuses(dataset).values())
    assert found["success"] == 20 and found["timeout"] + found["host_down"] == 60 and found["timeout"] <= 8
    assert can_heal("host_down")


@pytest.mark.parametrize(("asked", "requests", "status"), [("1", 2, "success"), ("3600", 1, "http_429")])
def test_a_host_that_asks_for_a_pause_gets_it(store, web, select, make, in_process, asked, requests, status):
    page, other = f"http://{HOST}/asks-to-wait-{asked}", f"http://{HOST}/other"
    start = time.monotonic()
    dataset = make(
        Download, store, {"rows": select(store, [page, other, "http://second.example/jpeg"])},
        hosts={HOST: web, "second.example": web}, retries=1, deadline=8, threads=1,
    )  # fmt: skip
    assert statuses(dataset) == {page: status, other: status, "http://second.example/jpeg": "success"}
    assert Handler.asked[f"asks-to-wait-{asked}"] == requests and Handler.asked["other"] == (status == "success")
    if status == "success":
        assert time.monotonic() - start >= 1


@pytest.mark.parametrize("pauses", [(30.0, 0.0), (0.0, 30.0)])
def test_of_two_pauses_the_one_that_ends_later_counts(pauses):
    """A short one may come as the answer to a request that was on its way when the host asked for the long one."""
    hosts = Hosts(2, 0)
    turns = [hosts.turn("a.example", Wait(1, time.monotonic() + 5)) for _ in pauses]
    for turn in turns:
        turn.__enter__()
    for turn, pause in zip(turns, pauses, strict=True):
        turn.__exit__(FetchError, FetchError(f"asked for {pause}", pause), None)
    with pytest.raises(FetchError, match="asked for 30.0"), hosts.turn("a.example", Wait(1, time.monotonic() + 5)):
        pass


def test_retry_after_is_seconds_or_a_date():
    assert _retry_after("120") == 120 and _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _retry_after("soon") is None and _retry_after(None) is None and _retry_after("-5") is None
    assert _retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 10**8


def test_a_shard_that_must_be_over_counts_the_rest_as_such(store, web, select, make, in_process):
    """Endless streams, one after the other: the first runs into its own deadline, the third into the shard's."""
    urls = [f"http://{HOST}/jpeg"] + [f"http://{HOST}/drips-body?{number}" for number in range(6)]
    start = time.monotonic()
    settings = {"threads": 1, "deadline": 1, "shard_deadline": 2.5, "host_failures": 0}
    dataset = make(Download, store, {"rows": select(store, urls)}, hosts={HOST: web}, **settings)
    assert time.monotonic() - start < 10
    assert Counter(statuses(dataset).values()) == {"success": 1, "deadline": 2, "shard_deadline": 4}
    assert dataset.manifest.summary["can_heal"] == 6


def test_rows_of_one_host_lie_far_apart():
    urls = ["http://big.example/"] * 6 + ["http://a.example/", "http://B.example/", "http://b.example/", "http://[broken"]
    order = spread(urls)
    assert sorted(order) == list(range(len(urls)))
    big = [place for place, row in enumerate(order) if row < 6]
    assert max(b - a for a, b in zip(big, big[1:], strict=False)) <= 3 and big != list(range(6))
