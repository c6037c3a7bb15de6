"""What looks like an outage is tried again, and no shard is given up for one; nor does a slow host hold up the next shard."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.download.network import Guard
from stages.download.outage import PAUSES, USUAL, Tally, Usual
from stages.download.stage import Download, Fetcher
from stages.runner.contract import Job, SetAside, Unit, scratch_output
from tests.stages.hostile_web import Handler, hostile_web
from tests.stages.pages import selector, table_of

# None of them lets a server wait: a machine that is busy with other tests may take seconds over an answer.
SETTINGS = {"retries": 0, "timeout": 20, "allow_private": True}


@pytest.fixture(scope="module")
def place():
    with hostile_web() as place:
        yield place


@pytest.fixture
def select(tmp_path, make):
    return selector(tmp_path, make)


@pytest.fixture
def resolver(place, monkeypatch, in_process):
    """Every name leads to the hostile web: after as many failures as `away` says, that of slow.example when `slow` is set.

    Of all questions those whose numbers are in `fails` have no answer.
    """

    class Resolver:
        asked: Counter[str] = Counter()
        away: dict[str, int] = {}
        slow = threading.Event()
        fails = range(0)

        def __call__(self, host, port, wait):
            self.asked[host] += 1
            if host == "slow.example":
                self.slow.wait(30)
            if self.asked[host] <= self.away.get(host.split(".")[0].rstrip("0123456789"), 0) or (
                self.asked.total() in self.fails
            ):
                raise socket.gaierror(socket.EAI_AGAIN, "no answer")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", int(place.split(":")[1])))]

    found = Resolver()
    found.asked, found.away, found.slow = Counter(), {}, threading.Event()
    monkeypatch.setattr("stages.download.network.Guard", partial(Guard, resolve=found))
    monkeypatch.setattr("stages.download.outage.PAUSES", (0.01, 0.01, 0.01))
    return found


def pages(kind, count, name="good"):
    return [f"http://{kind}{number}.example/{name}-{number}" for number in range(count)]


def test_a_shard_that_meets_an_outage_ends_as_if_there_had_been_none(store, select, make, resolver, caplog):
    resolver.away = {"a": 2}
    dataset = make(Download, store, {"rows": select(store, pages("a", 30))}, **SETTINGS)
    assert dataset.manifest.stats.rows_out == 30 and not dataset.manifest.stats.dropped
    assert set(resolver.asked.values()) == {3}
    told = [line for line in caplog.messages if "is tried again in" in line]
    assert len(told) == 2 and "not one picture came; 30 of 30 hosts gave no answer (dns 30)" in told[0]


def test_a_shard_of_which_nobody_answers_is_set_aside(store, select, make, resolver):
    resolver.away = {"a": 99}
    line = r"^not one picture came; 30 of 30 hosts gave no answer \(dns 30\), in 4 tries; is it this machine's network, resolver"
    with pytest.raises(SetAside, match=line):
        make(Download, store, {"rows": select(store, pages("a", 30))}, **SETTINGS)
    assert set(resolver.asked.values()) == {4} and not list(Path(store.root, "download").rglob("unit.json"))


def test_two_thirds_lost_are_an_outage_though_it_is_the_first_shard(store, select, make, resolver):
    resolver.away = {"a": 99}
    with pytest.raises(
        SetAside, match=r"^no picture came of 67% of the hosts, where 40% is usual; 200 of 300 hosts gave no answer"
    ):
        make(Download, store, {"rows": select(store, pages("a", 200) + pages("b", 100))}, **SETTINGS)


def test_a_resolver_that_fails_within_a_shard_of_one_host_loses_none_of_its_rows(store, select, make, resolver, caplog):
    resolver.fails = range(21, 61)
    # Every row asks: how many were spared by a host that counts as down would be a matter of pace.
    rows = select(store, [f"http://a1.example/good-{n}" for n in range(100)])
    dataset = make(Download, store, {"rows": rows}, **SETTINGS, host_failures=0)
    assert dataset.manifest.stats.rows_out == 100 and not dataset.manifest.stats.dropped
    assert "hosts that gave pictures fell silent; 0 of 1 hosts gave no answer, nor did" in caplog.text


def test_a_shard_that_servers_refuse_is_tried_again_and_kept(store, select, make, resolver, caplog):
    Handler.asked.clear()
    rows = select(store, pages("a", 20, "status-404") + pages("b", 20), shard_rows=20)
    dataset = make(Download, store, {"rows": rows}, **SETTINGS)
    assert dataset.manifest.stats.dropped == {"http_404": 20} and dataset.manifest.stats.rows_out == 20
    assert {Handler.asked[f"status-404-{n}"] for n in range(20)} == {4} and "it is servers that refuse: not one" in caplog.text
    assert table_of(dataset).num_rows == 40


def tally(hosts, lost, reason="dns"):
    return Tally.of((f"http://h{n}.example/", reason if n < lost else "") for n in range(hosts))


def test_what_is_unusual_is_told_from_the_shards_before():
    usual = Usual()
    assert usual.alarm(tally(1000, 550)) is None and usual.alarm(tally(1000, int(1000 * USUAL) + 260))
    for share in (90, 110, 100):
        usual.add(tally(1000, share))
    assert usual.alarm(tally(1000, 300)) is None
    assert "of 40% of the hosts, where 10% is usual" in (usual.alarm(tally(1000, 400)) or "")
    assert usual.alarm(tally(5, 3)) is None, "chance alone does that to so few"
    assert usual.alarm(tally(1, 1)) and usual.alarm(tally(0, 0)) is None
    assert list(PAUSES) == sorted(set(PAUSES))


def test_hosts_count_and_not_their_rows_and_addresses_that_are_none_do_not():
    rows = [("http://big.example/", "timeout")] * 500 + [("http://[", "bad_url"), ("http://10.0.0.1/", "forbidden_address")]
    found = Tally.of([*rows, ("http://a.example/", ""), ("http://a.example/", "dns"), ("http://b.example/", "http_404")])
    assert (found.hosts, found.lost, found.silent, found.broken, Usual().is_refusal(found)) == (3, 2, 1, 1, True)
    assert Usual().alarm(found) is None
    assert not Usual().is_refusal(tally(10, 10, "http_503")) and Usual().is_refusal(tally(10, 10, "http_403"))


def test_a_resolver_that_fails_for_some_is_no_refusal_though_as_many_links_are_dead_as_ever():
    dead = ["http_404"] * 990 + ["dns"] * 30 + [""] * 1980
    usual = Usual()
    for _ in range(3):
        usual.add(Tally.of((f"http://h{n}.example/", reason) for n, reason in enumerate(dead)))
    # Nine hundred hosts without an answer, of which some had refused before.
    failing = ["dns" if n % 10 < 3 else reason for n, reason in enumerate(dead)]
    found = Tally.of((f"http://h{n}.example/", reason) for n, reason in enumerate(failing))
    assert found.silent > 900 > 2 * (found.lost - 1020) // 2 and not usual.is_refusal(found)
    assert "of 31% of the hosts, where 1% is usual" in (usual.alarm(found) or "")
    gone = ["http_404" if n % 10 < 6 else reason for n, reason in enumerate(dead)]
    refused = Tally.of((f"http://h{n}.example/", reason) for n, reason in enumerate(gone))
    assert usual.alarm(refused) and usual.is_refusal(refused)


@pytest.mark.parametrize(
    "rows, reason, is_one", [(80, "dns", True), (80, "http_404", False), (80, "http_503", False), (10, "dns", False)]
)
def test_a_host_that_has_all_of_a_shard_and_falls_silent_is_an_outage(rows, reason, is_one):
    found = Tally.of(("http://one.example/", reason if n < rows else "") for n in range(100))
    assert bool(Usual().alarm(found)) == is_one


def test_a_large_host_among_many_that_falls_silent_is_none():
    rows = [("http://big.example/", "timeout" if n else "") for n in range(400)]
    found = Tally.of([*rows, *((f"http://h{n}.example/", "") for n in range(600))])
    assert found.broken == 399 and Usual().alarm(found) is None
    assert Usual().alarm(Tally.of(rows)), "but not where it has all"


def test_all_tries_of_a_shard_end_with_its_deadline_and_nobody_ends_it_before(store, select, make, resolver, monkeypatch):
    monkeypatch.setattr("stages.download.outage.PAUSES", (0.01, 60.0))
    resolver.away = {"a": 99}
    with pytest.raises(SetAside, match=r"in 2 tries; is it"):
        make(Download, store, {"rows": select(store, pages("a", 30))}, **SETTINGS, shard_deadline=30.0)
    assert Download.phases[0].least_limit(Download.Config(shard_deadline=1000.0)) > 2000.0


def test_the_next_shard_begins_while_the_last_waits_for_slow_hosts(store, select, resolver):
    shards = select(store, ["http://slow.example/good", *pages("a", 7), *pages("b", 8)], shard_rows=8)
    config = Download.Config(**SETTINGS, threads=4)
    fetcher = Fetcher(Job(store, "download", "test", config, {"rows": shards}, {}, {}))
    begun, ended = threading.Event(), []

    def run(number, room=lambda: None):
        with scratch_output(store) as out:
            out.give_room = room
            fetcher.run(Unit(str(number), (), {"path": shards.files[number].path}), out)
            ended.append((number, out.stats.rows_out))

    first = threading.Thread(target=run, args=(0, begun.set))
    first.start()
    assert begun.wait(30)
    run(1)
    assert ended == [(1, 8)], "the first still waits for its slow host"
    resolver.slow.set()
    first.join()
    assert ended == [(1, 8), (0, 8)]


def test_the_deadline_of_a_shard_that_waits_for_another_begins_with_its_turn(store, select, resolver):
    shards = select(store, pages("a", 4))
    config = Download.Config(**SETTINGS, shard_deadline=5.0)
    fetcher = Fetcher(Job(store, "download", "test", config, {"rows": shards}, {}, {}))
    ends = []
    fetcher.download = lambda rows, config, scratch, sink, end, all_begun: ends.append(end - time.monotonic())
    fetcher.usual = SimpleNamespace(alarm=lambda tally: None, add=lambda tally: None)
    fetcher.beginning.acquire()
    threading.Timer(0.5, fetcher.beginning.release).start()
    with scratch_output(store) as out:
        fetcher.run(Unit("0", (), {"path": shards.files[0].path}), out)
    assert 4.6 < ends[0] <= 5.0
