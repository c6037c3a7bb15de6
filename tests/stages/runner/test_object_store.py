"""What an object store is asked for, counted at the server, and what runs that meet there do: no amplification comes back."""

from __future__ import annotations

import time

import pytest

from benchmarks import s3_bytes_side as measured
from infra.store import Store
from stages.runner import packs

pytestmark = pytest.mark.usefixtures("bucket")


def test_who_reads_a_part_of_many_files_reads_little_else(s3):
    assert measured.select(s3, files=2, rows=250_000, ranges=6) < 2
    assert measured.compare(s3, files=2, rows=100_000, ranges=4) < 2
    assert measured.index(s3, units=100) < 2


def test_a_plan_of_many_units_is_a_listing_and_packs_of_records(s3, monkeypatch):
    assert measured.plan(s3, units=packs.FEW + 50) == 4  # the input, two listings, a pack
    (pack,) = packed_in("empty")
    monkeypatch.setattr(packs, "PACK", 40)
    # A record that is gone counts no more, and one that was made anew counts as it is now.
    store = Store(measured.STORE)
    records = sorted(path for path, *_ in store.walk("empty/units"))
    for path in records[:50]:
        store.discard(path)
    time.sleep(1.1)
    again = store.read(records[50]).replace(b'"seconds": 1.0', b'"seconds": 2.0').replace(b'"seconds":1.0', b'"seconds":2.0')
    store.write(records[50], again)
    fresh = packs.Packs(store, "empty")
    assert dict(fresh.read(records)) == {path: store.read(path) for path in records[50:]} and b"2.0" in again
    fresh.flush()
    assert pack in packed_in("empty"), "one that is more than half full stays"
    # A pack that is damaged is only a copy.
    store.write(pack, b"PAR1 no more")
    s3.forget()
    assert dict(packs.Packs(store, "empty").read(records)) == {path: store.read(path) for path in records[50:]}
    store.remove("empty")


def packed_in(stage):
    return [path for path, *_ in Store(measured.STORE).walk(f"{stage}/packs")]
