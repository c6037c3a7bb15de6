"""Leases on names in an object store: one holder at a time, and none for ever."""

from __future__ import annotations

import json
import threading
import time

import pytest

from infra import lease
from infra.store import Store


@pytest.fixture
def store(bucket, monkeypatch):
    monkeypatch.setattr(lease, "LOOKS", (0.05, 0.1))
    return Store(bucket)


def held_by_another(store, name, renewed):
    """Put a lease there whose holder says nothing any more; gives its path."""
    with store.claimed(name):
        (path,) = (path for path, *_ in store.walk(lease.FOLDER))
    store.write(path, json.dumps({"holder": "another", "renewed": renewed}).encode())
    return path


def seconds_until_held(store, name):
    start = time.monotonic()
    with store.claimed(name):
        return time.monotonic() - start


def test_one_holds_a_name_at_a_time_and_nothing_stays_behind(store):
    inside, most = [], []

    def work():
        with Store(store.root).claimed("unit"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    with store.claimed("another unit"):
        for thread in threads:
            thread.join()
    assert most == [1] * 4 and store.list(lease.FOLDER) == []


def test_a_lease_whose_holder_is_silent_ends(store, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES", 0.6)
    held_by_another(store, "unit", time.time())
    assert 0.6 < seconds_until_held(store, "unit") < 5


def test_the_clocks_of_two_machines_need_not_agree_but_hours_are_no_difference_of_clocks(store, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES", 0.6)
    held_by_another(store, "unit", time.time() - lease.CLOCKS + 10)
    assert seconds_until_held(store, "unit") > 0.6
    monkeypatch.setattr(lease, "EXPIRES", 60.0)
    held_by_another(store, "unit", time.time() - 7200)
    assert seconds_until_held(store, "unit") < 10


def test_who_works_for_longer_than_a_lease_lasts_keeps_it(store, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRES", 0.8)
    monkeypatch.setattr(lease, "RENEWED", 0.1)
    begun, over = threading.Event(), []

    def work():
        with Store(store.root).claimed("unit"):
            begun.set()
            time.sleep(2)
            over.append(time.monotonic())

    holder = threading.Thread(target=work)
    holder.start()
    assert begun.wait(10)
    with store.claimed("unit"):
        assert over
    holder.join()


def test_who_has_lost_a_lease_leaves_the_next_holders_alone(store, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED", 0.05)
    with store.claimed("unit"):
        (path,) = (path for path, *_ in store.walk(lease.FOLDER))
        theirs = json.dumps({"holder": "another", "renewed": time.time()}).encode()
        # Renewing looks and then writes, so a write that is on its way may come after this one.
        while store.read(path) != theirs:
            store.write(path, theirs)
            time.sleep(0.3)
        monkeypatch.setattr(lease, "EXPIRES", 0.0)
    assert store.read(path) == theirs
    store.discard(path)
