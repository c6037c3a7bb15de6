"""The records of a stage's units on an object store, thousands in a request.

A unit's record is a small object of its own, so that it appears at once. Whoever runs a phase of many units copies the records
into packs as they come: Parquet with a record a row. To read, one lists the records, which takes a request a thousand, reads the
packs, and asks singly for the few records that no pack has yet.

    STAGE/units/KE/KEY/unit.json    what counts
    STAGE/packs/NAME.parquet        copies: a record may be removed and made anew, so a row counts while the record that is listed
                                    was written when the row says, or, where it says nothing, before the pack
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from infra.store import Store

# So few records are asked for one by one.
FEW = 100
# Records in a pack, and how many are new when it is written anew, with those that it has: in all a record is written three times.
PACK = 8192
NEW = 2048
RECORD_FILE = "unit.json"
ROWS = pa.schema([("path", pa.string()), ("written", pa.timestamp("us", "UTC")), ("record", pa.binary())])

Row = tuple[str, datetime | None, bytes]


class Packs:
    """Reads the records of one stage's units, and packs what is found and added."""

    def __init__(self, store: Store, stage: str) -> None:
        self.store, self.stage = store, stage
        # What the pack that is being filled holds, how many of them it did not hold when it was written last, and its name.
        self.rows: list[Row] = []
        self.new, self.name = 0, ""
        # Packs whose rows are in the one that is being filled.
        self.taken: list[str] = []

    def read(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Path and content of those of these records that are there, in any order."""
        listed = {path: moment for path, _, moment in self.store.walk(f"{self.stage}/units") if path.endswith(f"/{RECORD_FILE}")}
        wanted = set(paths) & listed.keys()
        for rows in self._packed(listed):
            for path, _, record in rows:
                if path in wanted:
                    wanted.remove(path)
                    yield path, record
        loose = [path for path in paths if path in wanted]
        for path, found in zip(loose, self.store.read_many(loose), strict=True):
            if found is not None:
                self.rows.append((path, listed[path], found))
                self.new += 1
                yield path, found

    def _packed(self, listed: Mapping[str, datetime]) -> Iterator[list[Row]]:
        """The rows that count, pack by pack; those of packs that are half empty go into the one that is being filled."""
        packs = {path: moment for path, _, moment in self.store.walk(f"{self.stage}/packs")}
        for pack, data in zip(packs, self.store.read_many(list(packs)), strict=True):
            # Another run may have put its rows into another pack. One that is damaged is only a copy.
            table = _table(data) if data is not None else None
            if table is None:
                continue
            rows: list[Row] = [
                (path, listed[path], record)
                for path, written, record in zip(*table.to_pydict().values(), strict=True)
                if path in listed and (listed[path] < packs[pack] if written is None else listed[path] == written)
            ]
            if len(rows) < PACK // 2 and len(self.rows) + len(rows) <= PACK:
                self.rows += rows
                self.taken.append(pack)
            yield rows

    def add(self, path: str, record: bytes) -> None:
        """A record that was just written, or found to be. A store that takes no pack now is asked again when more are new."""
        self.rows.append((path, None, record))
        self.new += 1
        if self.new % NEW == 0:
            with suppress(OSError):
                self.flush()

    def flush(self) -> None:
        """Write down what no pack has yet."""
        if not self.new:
            return
        while self.new:
            self.name = self.name or f"{self.stage}/packs/{uuid4().hex}.parquet"
            some = self.rows[:PACK]
            columns = [pa.array(column, field.type) for column, field in zip(zip(*some, strict=True), ROWS, strict=True)]
            buffer = io.BytesIO()
            pq.write_table(pa.table(columns, schema=ROWS), buffer, compression="zstd", write_page_checksum=True)
            self.store.write(self.name, buffer.getvalue())
            self.new = max(0, len(self.rows) - PACK)
            if len(some) == PACK:
                self.rows, self.name = self.rows[PACK:], ""
        for pack in self.taken:
            self.store.discard(pack)
        self.taken = []


def _table(data: bytes) -> pa.Table | None:
    try:
        return pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError):
        return None
