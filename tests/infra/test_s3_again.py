"""A store that is out of order for a while."""

from __future__ import annotations

import asyncio
import random
import socket
import time

import pytest
from botocore.exceptions import ClientError

from infra import lease
from infra.store import Store, StoreError
from infra.store_access import check_seen

SECONDS = 16.0


@pytest.fixture
def out_of_order(s3, bucket, monkeypatch):
    """The server answers 503 until those who ask again have waited for so many seconds, which nobody really does."""
    waited, sleep = [0.0], asyncio.sleep

    async def at_once(seconds, *more):
        waited[0] += seconds
        await sleep(0, *more)

    def begin(seconds=SECONDS):
        # botocore draws the length of its pauses.
        random.seed(0)
        waited[0] = 0.0
        monkeypatch.setattr(asyncio, "sleep", at_once)
        monkeypatch.setattr(s3, "busy", lambda: waited[0] < seconds)

    return begin


def test_reads_writes_and_listings_outlast_a_server_that_is_out_of_order(bucket, out_of_order, tmp_path):
    store = Store(bucket)
    store.write("there/one", b"1")
    (tmp_path / "file").write_bytes(b"published")

    def written():
        with store.writing("there/parts") as file:
            file.write(b"parts")

    asked = {
        "read": lambda: store.read("there/one") == b"1",
        "read many": lambda: list(store.read_many(["there/one", "there/none"])) == [b"1", None],
        "range": lambda: store.ranges("there/one").read(1) == b"1",
        "open": lambda: store.open("there/one").read() == b"1",
        "fetch": lambda: store.fetch("there/one", tmp_path / "fetched").read_bytes() == b"1",
        "exists": lambda: store.exists("there/one") and not store.exists("there/none"),
        "list": lambda: store.list("there")[0] == "one",
        "walk": lambda: next(store.walk("there"))[0] == "there/one",
        "write": lambda: store.write("there/two", b"2", once=True) and not store.write("there/two", b"3", once=True),
        "publish": lambda: store.publish(tmp_path / "file", "there/file")[0] == 9,
        "writing": lambda: written() is None and store.read("there/parts") == b"parts",
        "discard": lambda: store.discard("there/two") is None and not store.exists("there/two"),
    }
    for name, ask in asked.items():
        out_of_order()
        assert ask(), name


def test_a_machine_waits_for_a_store_that_is_busy_and_says_so(s3, bucket, monkeypatch, caplog):
    """It is asked at the beginning of every phase, by each worker, when the command has long written there."""
    monkeypatch.setattr("infra.store_access.SECONDS", 0.3)
    monkeypatch.setattr("infra.store_access.PATIENCE", 30.0)
    until = time.monotonic() + 2.0
    monkeypatch.setattr(s3, "busy", lambda: time.monotonic() < until)
    check_seen(Store(bucket))
    assert time.monotonic() > until
    said = f"{bucket}: no answer in 0 s on the machine {socket.gethostname()}; waits up to 30 s more, as it may be busy"
    assert caplog.messages == [said]


def test_a_machine_does_not_wait_for_ever(s3, bucket, monkeypatch):
    monkeypatch.setattr("infra.store_access.SECONDS", 0.2)
    monkeypatch.setattr("infra.store_access.PATIENCE", 0.8)
    monkeypatch.setattr(s3, "busy", lambda: True)
    told = f"^the machine {socket.gethostname()} does not reach the store: {bucket}: no answer in 1 s; check the address"
    with pytest.raises(StoreError, match=told):
        check_seen(Store(bucket))


def test_one_that_stays_out_of_order_is_told(bucket, out_of_order):
    out_of_order(float("inf"))
    with pytest.raises(OSError) as error:
        Store(bucket).read("there/one")
    assert isinstance(error.value.__cause__, ClientError)


def test_a_lease_whose_put_was_answered_by_an_error_is_held_all_the_same(bucket, monkeypatch):
    """The store has it, the holder asks again and is told that somebody has it."""
    write, put = Store.write, []

    def answered_late(self, path, data, once=False):
        if not put:
            put.append(write(self, path, data, once))
        return write(self, path, data, once)

    monkeypatch.setattr(Store, "write", answered_late)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: pytest.fail("it waits for itself"))
    with Store(bucket).claimed("late"):
        assert put == [True]
