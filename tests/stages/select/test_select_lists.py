"""Allow and deny lists against Python sets, over several ranges of keys and runs."""

from __future__ import annotations

import gzip
import random
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store import Store
from stages.runner.contract import StageError
from stages.select import keys
from stages.select.lists import Match
from stages.select.stage import Select

HOSTS = [
    "a.example", "b.example", "Pics.A.example", "deep.pics.a.example:8080", "xa.example", "c.test", "user@c.test", "x:y@z@c.test",
    "c.t\test", "b\u00fccher.example", "new.B\u00dcCHER.example", "xn--bcher-kva.example",
]  # fmt: skip


@pytest.fixture
def small_ranges(monkeypatch):
    """So that a few hundred rows take several ranges, runs and row groups."""
    for name, value in (("RANGE_KEYS", 100), ("RUN", 64), ("GROUP", 16), ("CHUNK", 2)):
        monkeypatch.setattr(keys, name, value)


def rows_of(count, seed):
    chance = random.Random(seed)
    urls = [f"http://{chance.choice(HOSTS)}/{chance.randrange(count)}" for _ in range(count)]
    hashes = [chance.choice([None, chance.randrange(-(2**63), 2**63), chance.randrange(-50, 50)]) for _ in range(count)]
    return list(zip(urls, hashes, strict=True))


def write(path, rows):
    urls, hashes = zip(*rows, strict=True)
    pq.write_table(pa.table({"URL": urls, "TEXT": ["text"] * len(urls), "hash": pa.array(hashes, pa.int64())}), path)


def on_list(row, entries):
    url, number = row
    host = (urlsplit(url).hostname or "").encode("idna").decode("ascii").split(".")
    domains = {".".join(host[start:]) for start in range(len(host))}
    return url in entries or number in entries or bool(domains & entries)


def expected(files, allow=None, deny=frozenset()):
    kept, dropped, urls, hashes = [], {}, set(), set()
    for row in (row for rows in files for row in rows):
        if allow is not None and not on_list(row, allow):
            reason = "not_allowed"
        elif on_list(row, deny):
            reason = "denied"
        else:
            reason = "duplicate_url" if row[0] in urls else "duplicate_hash" if row[1] in hashes else None
            urls.add(row[0])
            hashes |= {row[1]} - {None}
        if reason is None:
            kept.append(row)
        else:
            dropped[reason] = dropped.get(reason, 0) + 1
    return kept, dropped


def read(dataset):
    table = pa.concat_tables([pq.read_table(dataset.url(entry)) for entry in dataset.files])
    return list(zip(table["url"].to_pylist(), table["hash"].to_pylist(), strict=True))


@pytest.fixture
def files(tmp_path):
    made = [rows_of(400, 1), rows_of(300, 2), rows_of(200, 3)]
    for number, rows in enumerate(made):
        write(tmp_path / f"part-{number}.parquet", rows)
    return made


def test_duplicates_over_many_ranges(tmp_path, store, make, in_process, files, small_ranges):
    dataset = make(Select, store, metadata=[str(tmp_path / "part-*.parquet")])
    kept, dropped = expected(files)
    assert (
        read(dataset) == kept
        and dataset.manifest.stats.dropped == dropped
        and set(dropped) == {"duplicate_url", "duplicate_hash"}
    )


def test_how_keys_are_cut_does_not_matter(tmp_path, store, make, in_process, files, digests, unit_times, monkeypatch):
    """Other ranges: the files are the same, and what was written stays valid."""
    one = make(Select, store, metadata=[str(tmp_path / "part-*.parquet")])
    before = unit_times(store, "select")
    manifest = next(store_path for store_path in (tmp_path / "store/select").glob("*/manifest.json"))
    manifest.unlink()
    monkeypatch.setattr(keys, "RANGE_KEYS", 100)
    other = make(Select, store, metadata=[str(tmp_path / "part-*.parquet")])
    assert digests(one) == digests(other)
    new = unit_times(store, "select").keys() - before.keys()
    assert len(new) > 10, "duplicates by URL and by hash in several ranges each"
    assert one.manifest.stats == other.manifest.stats


@pytest.mark.parametrize("deny_first", [False, True])
def test_mixed_lists_as_a_loop_over_sets_does_it(tmp_path, store, make, in_process, files, small_ranges, deny_first):
    everything = [row for rows in files for row in rows]
    chance = random.Random(5)
    urls = {url for url, _ in chance.sample(everything, 300)}
    hashes = {number for _, number in chance.sample(everything, 300) if number is not None}
    pq.write_table(pa.table({"url": sorted(urls)}), tmp_path / "urls.parquet")
    pq.write_table(pa.table({"hash": pa.array(sorted(hashes), pa.int64())}), tmp_path / "hashes.parquet")
    with gzip.open(tmp_path / "optouts.txt.gz", "wt") as file:
        file.write("# a comment\n\nPICS.a.example\n*.c.test\nhttp://b.example/7\n-3\nnone.example\n.new.b\u00fccher.example\n")
    texts = {"pics.a.example", "c.test", "http://b.example/7", -3, "none.example", "new.xn--bcher-kva.example"}
    lists = [[str(tmp_path / "urls.parquet"), str(tmp_path / "hashes.parquet")], [str(tmp_path / "optouts.txt.gz")]]
    if deny_first:
        lists.reverse()
    dataset = make(Select, store, metadata=[str(tmp_path / "part-*.parquet")], allow=lists[0], deny=lists[1])
    sets = [urls | hashes, texts]
    kept, dropped = expected(files, *(sets[::-1] if deny_first else sets))
    assert read(dataset) == kept and dataset.manifest.stats.dropped == dropped
    assert {"not_allowed", "denied"} <= set(dropped)
    assert any(name.endswith("optouts.txt.gz") for name in dataset.manifest.summary["lists"])


def test_a_deny_list_alone_and_an_appended_file(tmp_path, store, make, in_process, files, digests, unit_times):
    (tmp_path / "deny.txt").write_text("a.example\n")
    config = {"metadata": [str(tmp_path / "part-*.parquet")], "deny": [str(tmp_path / "deny.txt")]}
    hidden = (tmp_path / "part-2.parquet").rename(tmp_path / "later")
    before = make(Select, store, **config)
    done = unit_times(store, "select")
    hidden.rename(tmp_path / "part-2.parquet")
    after = make(Select, store, **config)
    assert digests(after).items() > digests(before).items() and unit_times(store, "select").items() >= done.items()
    assert digests(make(Select, Store(str(tmp_path / "other")), **config)) == digests(after)
    kept, dropped = expected(files, None, {"a.example"})
    assert read(after) == kept and after.manifest.stats.dropped == dropped


def test_a_grown_list_redoes_no_file_that_it_does_not_touch(tmp_path, store, make, in_process, digests):
    for number in range(2):
        write(
            tmp_path / f"part-{number}.parquet", [(f"http://host{number}.example/{row}", 10 * number + row) for row in range(5)]
        )
    (tmp_path / "deny.txt").write_text("elsewhere.example\n")
    config = {"metadata": [str(tmp_path / "part-*.parquet")], "deny": [str(tmp_path / "deny.txt")]}
    first = make(Select, store, **config)
    (tmp_path / "deny.txt").write_text("elsewhere.example\nhttp://host1.example/3\n")
    second = make(Select, store, **config)
    assert second.manifest.stats.dropped == {"denied": 1}
    assert first.files[0] == second.files[0] and first.files[1] != second.files[1]


def test_what_a_list_lists_can_be_told(tmp_path, store, make, in_process):
    """Without being told, a file with URLs and hashes counts by its URLs."""
    write(tmp_path / "a.parquet", [("http://a.example/1", 1), ("http://a.example/2", 2)])
    write(tmp_path / "list.parquet", [("http://a.example/1", 2)])
    config = {"metadata": [str(tmp_path / "a.parquet")], "deny": [str(tmp_path / "list.parquet")]}
    assert read(make(Select, store, **config)) == [("http://a.example/2", 2)]
    assert read(make(Select, store, **config, deny_by="hash")) == [("http://a.example/1", 1)]
    with pytest.raises(StageError, match="list.parquet: columns found: URL, TEXT, hash; a list needs domain"):
        make(Select, store, **config, deny_by="domain")


@pytest.mark.parametrize(
    ("line", "by", "message"),
    [
        ("not a url", "auto", "line 3: 'not a url' is no url, hash or domain"),
        ("b.example", "url", "line 3: 'b.example' is no url"),
        ("http://a.example/1", "domain", "line 2: 'http://a.example/9' is no domain"),
        ("*.com", "auto", r"line 3: '\*\.com' is no url, hash or domain"),
        ("a.*.example", "auto", "is no url, hash or domain"),
        ("||a.example^", "auto", "is no url, hash or domain"),
        ("b\ufffdcher.example", "auto", "is no url, hash or domain"),
    ],
)
def test_a_line_that_means_nothing_is_refused(tmp_path, store, make, in_process, line, by, message):
    write(tmp_path / "a.parquet", [("http://a.example/1", 1)])
    (tmp_path / "deny.txt").write_text(f"# opt-outs\nhttp://a.example/9\n{line}\n")
    with pytest.raises(StageError, match=message):
        make(Select, store, metadata=[str(tmp_path / "a.parquet")], deny=[str(tmp_path / "deny.txt")], deny_by=by)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_however_a_list_is_encoded(tmp_path, store, make, in_process, encoding):
    rows = [(f"http://{host}/caf\u00e9\ufffd", number) for number, host in enumerate(["a.example", "b.example", "c.example"])]
    write(tmp_path / "a.parquet", rows)
    (tmp_path / "deny.txt").write_bytes(f"{rows[0][0]}\r\n\r\n# more\r\nb.example".encode(encoding))
    assert read(make(Select, store, metadata=[str(tmp_path / "a.parquet")], deny=[str(tmp_path / "deny.txt")])) == rows[2:]


def test_a_line_of_a_list_that_is_no_text_is_refused(tmp_path, store, make, in_process):
    """It would list an address that nobody has."""
    write(tmp_path / "a.parquet", [("http://a.example/1", 1)])
    (tmp_path / "deny.txt").write_bytes("http://a.example/1\nhttp://a.example/caf\u00e9\n".encode("latin-1"))
    with pytest.raises(StageError, match="deny.txt: line 2 is not UTF-8"):
        make(Select, store, metadata=[str(tmp_path / "a.parquet")], deny=[str(tmp_path / "deny.txt")])


BOOKS = ["b\u00fccher.example", "BU\u0308CHER.Example.", "xn--bcher-kva.example", "shop.xn--bcher-kva.example"]
STREETS = ["stra\u00dfe.example", "xn--strae-oqa.example"]
SPELLED = [*BOOKS, *STREETS, "strasse.example", "xb\u00fccher.example", "\u4f8b\u3048\u3002\u30c6\u30b9\u30c8", "plain.example"]


@pytest.mark.parametrize(
    ("entry", "hosts"),
    [
        ("b\u00fccher.example", BOOKS),
        ("XN--BCHER-KVA.example", BOOKS),
        ("*.B\u00dccher.example.", BOOKS),
        (".xn--bcher-kva.example", BOOKS),
        ("shop.b\u00fccher.example", BOOKS[3:]),
        # Download looks this name up as strasse.example; its owner has registered the other form.
        ("stra\u00dfe.example", [*STREETS, "strasse.example"]),
        ("strasse.example", ["stra\u00dfe.example", "strasse.example"]),
        ("xn--r8jz45g.xn--zckzah", ["\u4f8b\u3048\u3002\u30c6\u30b9\u30c8"]),
        ("*.plain.example", ["plain.example"]),
    ],
)
@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_however_a_domain_is_written(tmp_path, store, make, in_process, kind, entry, hosts):
    """Also behind the mark that Windows puts at the beginning of a text."""
    rows = [(f"http://{host}/{number}", number) for number, host in enumerate(SPELLED)]
    write(tmp_path / "a.parquet", rows)
    if kind == "txt":
        (tmp_path / "deny.txt").write_text(f"\ufeff{entry}\r\n", encoding="utf-8")
    else:
        pq.write_table(pa.table({"domain": ["none.example", None, "", entry]}), tmp_path / "deny.parquet")
    dataset = make(Select, store, metadata=[str(tmp_path / "a.parquet")], deny=[str(tmp_path / f"deny.{kind}")])
    assert read(dataset) == [row for row, host in zip(rows, SPELLED, strict=True) if host not in hosts]
    assert dataset.manifest.stats.dropped == {"denied": len(hosts)}


def test_a_column_of_domains_with_something_else_in_it_is_refused(tmp_path, store, make, in_process, monkeypatch):
    monkeypatch.setattr("stages.select.lists.BATCH", 2)
    write(tmp_path / "a.parquet", [("http://a.example/1", 1)])
    pq.write_table(pa.table({"domain": ["a.example", None, "b.example", "https://c.example/x"]}), tmp_path / "deny.parquet")
    with pytest.raises(
        StageError, match=r"deny.parquet, row 3: 'https://c.example/x' is no domain; write its name alone"
    ) as error:
        make(Select, store, metadata=[str(tmp_path / "a.parquet")], deny=[str(tmp_path / "deny.parquet")])
    assert "\n" not in str(error.value)


class Counted(np.ndarray):
    """An array that counts the numbers that numpy's functions are given with it."""

    given = 0

    def __array_function__(self, function, types, args, kwargs):
        arrays = args[0] if isinstance(args[0], list) else args
        Counted.given += sum(array.size for array in arrays if isinstance(array, np.ndarray))
        return super().__array_function__(function, types, args, kwargs)


def test_the_entries_of_many_lists_are_put_together_once(monkeypatch):
    """A list of LAION's size comes in thousands of pieces: each is looked at once, and not again with every piece after it."""
    pieces = np.random.default_rng(0).integers(0, 2**64, (2000, 60), dtype=np.uint64)
    pieces[7] = pieces[3]
    counted = pieces.view(Counted)
    monkeypatch.setattr("stages.select.lists.read_keys", lambda job, path, low, high: ((p, p) for p in counted[int(path) :: 4]))
    monkeypatch.setattr(Counted, "given", 0)
    found = Match(None)._entries(("0", "1", "2", "3"), 0, 2**64)
    assert pieces.size <= Counted.given <= 2 * pieces.size
    assert found.tolist() == sorted(pieces.ravel().tolist())
