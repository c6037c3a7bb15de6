"""Schemas, presets, conditions on any column and samples, against what a person would work out by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from stages.runner.contract import StageError, result_fields
from stages.select.laion import SCHEMAS
from stages.select.presets import PRESETS
from stages.select.stage import Select, SelectConfig

# Columns as the sets' own descriptions list them.
COLUMNS = {
    "laion2B-en": "SAMPLE_ID URL TEXT HEIGHT WIDTH LICENSE NSFW similarity",
    "laion2B-en-joined": "URL TEXT WIDTH HEIGHT similarity hash pwatermark punsafe",
    "laion-high-resolution": "URL TEXT WIDTH HEIGHT similarity LANGUAGE hash pwatermark punsafe",
    "laion-aesthetics": "URL TEXT WIDTH HEIGHT similarity punsafe pwatermark AESTHETIC_SCORE hash",
    "relaion": "url caption width height similarity",
}
TEXT = {"URL": "http://a.example/{}", "url": "http://a.example/{}", "LANGUAGE": "en", "LICENSE": "?", "NSFW": "UNLIKELY"}
TEXT |= {"TEXT": "a caption", "caption": "a caption"}


def table_of(schema, rows=3, **changed):
    columns = {}
    for name in COLUMNS[schema].split():
        columns[name] = [TEXT[name].format(row) if name in TEXT else 512 + row for row in range(rows)]
    return pa.table(columns | changed)


def kept(dataset):
    return [row["url"].rsplit("/", 1)[-1] for entry in dataset.files for row in pq.read_table(dataset.url(entry)).to_pylist()]


@pytest.fixture
def metadata(tmp_path):
    def write(table, name="a.parquet"):
        pq.write_table(table, tmp_path / name)
        return [str(tmp_path / name)]

    return write


@pytest.mark.parametrize("schema", COLUMNS)
def test_every_set_of_laion_is_detected(store, make, in_process, metadata, schema):
    dataset = make(Select, store, metadata=metadata(table_of(schema)), min_width=513)
    assert dataset.manifest.summary["schemas"] == {schema: 1} and kept(dataset) == ["1", "2"]
    assert set(COLUMNS) == set(SCHEMAS)


def test_sets_can_be_mixed_and_a_named_one_is_required(store, make, in_process, metadata):
    paths = metadata(table_of("laion2B-en"), "a.parquet") + metadata(table_of("relaion", 5), "b.parquet")
    dataset = make(Select, store, metadata=paths)
    assert dataset.manifest.summary["schemas"] == {"laion2B-en": 1, "relaion": 1}
    assert kept(dataset) == ["0", "1", "2", "3", "4"] and dataset.manifest.stats.dropped == {"duplicate_url": 3}
    with pytest.raises(StageError, match="b.parquet: no column URL, TEXT, WIDTH, HEIGHT, LICENSE, NSFW, which laion2B-en has"):
        make(Select, store, metadata=paths, laion_schema="laion2B-en")


@pytest.mark.parametrize(
    ("where", "rows", "dropped"),
    [
        ("NSFW in [UNLIKELY, UNSURE]", "0 1 3", {"where_NSFW": 1}),
        ("NSFW not in [NSFW]", "0 1 3", {"where_NSFW": 1}),
        ("NSFW == UNLIKELY", "0 3", {"where_NSFW": 2}),
        ("LICENSE != ?", "1", {"where_LICENSE": 3}),
        ("seen >= 2", "1 2 3", {"where_seen": 1}),
        ("seen < 3", "0 1 3", {"where_seen": 1}),
        ("seen in [1, 3.0]", "0 2 3", {"where_seen": 1}),
        ('LICENSE not in ["cc-by", "all, rights"]', "0 2 3", {"where_LICENSE": 1}),
    ],
)
def test_conditions_on_any_column(store, make, in_process, metadata, where, rows, dropped):
    """The last row's `seen` is null: unknown, so it stays unless nulls are to go."""
    own = {"NSFW": ["UNLIKELY", " UNSURE ", "NSFW", "UNLIKELY"], "LICENSE": ["?", "cc-by", "?", "?"], "seen": [1, 2, 3, None]}
    paths = metadata(table_of("laion2B-en", 4, **own))
    dataset = make(Select, store, metadata=paths, where=[where])
    assert kept(dataset) == rows.split() and dataset.manifest.stats.dropped == dropped
    strict = make(Select, store, metadata=paths, where=[where], keep_null=False)
    assert ("3" not in kept(strict)) == ("seen" in where or "3" not in rows)
    assert strict.manifest.stats.dropped.get("null_where_seen", 0) == int("seen" in where)


def test_a_condition_in_another_form_is_refused():
    with pytest.raises(ValidationError, match="quotes come in pairs"):
        SelectConfig(metadata=["a"], where=['LICENSE == "a'])


def test_a_bound_may_be_any_number(store, make, in_process, metadata):
    paths = metadata(table_of("laion2B-en", 4))
    assert len(kept(make(Select, store, metadata=paths, max_width=2**64))) == 4
    with pytest.raises(StageError, match="no row is left of 4: 4 min_width"):
        make(Select, store, metadata=paths, min_width=2**64)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("status == 200", ["columns found: SAMPLE_ID, URL", "columns needed: status"]),
        ("WIDTH == wide", ["column WIDTH is int64, expected string"]),
    ],
)
def test_a_condition_on_a_column_that_cannot_meet_it(store, make, in_process, metadata, where, words):
    with pytest.raises(StageError) as error:
        make(Select, store, metadata=metadata(table_of("laion2B-en")), where=[where])
    assert all(word in str(error.value) for word in ["a.parquet", *words])


def test_a_file_that_cannot_be_used_is_refused_before_any_work(tmp_path, store, make, in_process, metadata):
    paths = metadata(table_of("laion2B-en"), "a.parquet") + metadata(table_of("relaion").drop_columns("url"), "z.parquet")
    with pytest.raises(StageError, match="z.parquet: columns found"):
        make(Select, store, metadata=paths)
    assert not list(tmp_path.rglob("unit.json"))


def test_a_value_that_cannot_be_read_is_one_counted_row(store, make, in_process, metadata):
    """Whatever becomes of nulls; an empty cell is one of these."""
    cells = {"WIDTH": ["600", "700.0", "wide", "", "90", None], "similarity": ["0.31", "0.5", "0.5", "0.4", "high", "0.1"]}
    paths = metadata(table_of("laion2B-en", 6, **cells))
    config = {"metadata": paths, "min_width": 100, "min_similarity": 0.3}
    lenient = make(Select, store, **config)
    assert kept(lenient) == ["0", "1", "3"]
    assert lenient.manifest.stats.dropped == {"bad_width": 1, "min_width": 1, "min_similarity": 1}
    strict = make(Select, store, **config, keep_null=False)
    assert strict.manifest.stats.dropped == {"bad_width": 1, "min_width": 1, "null_width": 2}
    with pytest.raises(StageError, match="no row is left of 6: 6 bad_where_NSFW"):
        make(Select, store, metadata=paths, where=["NSFW >= 3"])


def test_a_column_that_nothing_asks_for_is_not_looked_at(store, make, in_process, metadata):
    """What of it can be read travels along."""
    odd = {"hash": ["12", "md5:af", "-3"], "WIDTH": ["600", "wide", None], "punsafe": [[0.1], [], None], "pwatermark": [True] * 3}
    dataset = make(Select, store, metadata=metadata(table_of("laion2B-en-joined", **odd)))
    table = pq.read_table(dataset.url(dataset.files[0]))
    assert table["hash"].to_pylist() == [12, None, -3] and table["width"].to_pylist() == [600, None, None]
    assert table["punsafe"].null_count == 3 and table["pwatermark"].to_pylist() == [1.0] * 3
    assert dataset.manifest.stats.dropped == {} and dataset.manifest.summary["unread"] == {"hash": 1, "width": 1}
    with pytest.raises(StageError, match=r"a.parquet: column punsafe is list<.*>, expected float"):
        make(Select, store, metadata=metadata(table_of("laion2B-en-joined", **odd)), max_punsafe=0.5)


def test_a_column_that_is_there_twice_is_refused_where_it_is_read(store, make, in_process, metadata):
    twice = table_of("laion2B-en").append_column("NSFW", pa.array(["a", "b", "c"]))
    assert kept(make(Select, store, metadata=metadata(twice))) == ["0", "1", "2"]
    with pytest.raises(StageError, match="a.parquet: has 2 columns NSFW; leave one, or rename the others"):
        make(Select, store, metadata=metadata(twice), where=["NSFW == a"])
    sizes = twice.append_column("WIDTH", pa.array([1, 2, 3]))
    with pytest.raises(StageError, match="a.parquet: has 2 columns WIDTH"):
        make(Select, store, metadata=metadata(sizes))


STORED = {
    "string_view": lambda values: pa.array(values, pa.string_view()),
    "binary_view": lambda values: pa.array([value and value.encode() for value in values], pa.binary_view()),
    "large_binary": lambda values: pa.array([value and value.encode() for value in values], pa.large_binary()),
    "dictionary": lambda values: pa.array(values).dictionary_encode(),
    "dictionary of large text": lambda values: pa.array(values, pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("stored", STORED)
def test_text_is_text_however_it_is_stored(tmp_path, store, make, in_process, metadata, stored):
    """In metadata, in conditions on any column, and in lists."""
    column = STORED[stored]
    urls = [f"http://{host}.example/{row}" for row, host in enumerate("abcda")]
    own = {
        "URL": column(urls),
        "TEXT": column(["one", " two ", None, "four", "five"]),
        "NSFW": column(["a", "b", "a", "a", None]),
    }
    paths = metadata(table_of("laion2B-en", 5, **own))
    pq.write_table(pa.table({"domain": column(["d.example", None, "x.example"])}), tmp_path / "deny.parquet")
    dataset = make(Select, store, metadata=paths, where=["NSFW == a"], deny=[str(tmp_path / "deny.parquet")])
    table = pq.read_table(dataset.url(dataset.files[0]))
    assert list(zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True)) == [(urls[0], "one"), (urls[4], "five")]
    assert dataset.manifest.stats.dropped == {"no_caption": 1, "where_NSFW": 1, "denied": 1}


def test_text_that_is_no_text_is_counted(store, make, in_process, metadata):
    texts = pa.array([b"fine", b"\xff\xfe", b"also fine"], pa.binary())
    urls = pa.array([b"http://a.example/0", b"http://a.example/1", b"http://\xff"], pa.binary())
    dataset = make(Select, store, metadata=metadata(table_of("laion2B-en", TEXT=texts, URL=urls)))
    assert kept(dataset) == ["0"] and dataset.manifest.stats.dropped == {"no_caption": 1, "no_url": 1}


def test_presets_are_thresholds_that_fields_override():
    config = SelectConfig.model_validate(
        {"metadata": ["a"], "preset": "laion-aesthetics-512", "max_punsafe": 0.2, "min_side": None}
    )
    assert (config.min_aesthetic, config.max_punsafe, config.min_side) == (5.0, 0.2, None)
    spelled = SelectConfig(
        metadata=["a"], min_similarity=0.28, max_punsafe=0.2, max_pwatermark=0.79999995, min_aesthetic=5.0
    )  # fmt: skip
    assert result_fields(config) == result_fields(spelled), "the manifest and the fingerprint hold the numbers"
    for name, values in PRESETS.items():
        assert result_fields(SelectConfig.model_validate({"metadata": ["a"], "preset": name})).items() >= values.items()


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
@pytest.mark.parametrize(("column", "bound"), [("punsafe", 0.5), ("pwatermark", 0.8)])
def test_a_presets_scores_are_below_their_thresholds(store, make, in_process, metadata, kind, column, bound):
    """As the sets were published: at the threshold itself a picture is unsafe, or watermarked."""
    below, above = (float(np.nextafter(np.float32(bound), np.float32(side))) for side in (0, 1))
    fine = pa.array([0.1] * 3, kind)
    scores = {"punsafe": fine, "pwatermark": fine} | {column: pa.array([below, bound, above], kind)}
    paths = metadata(table_of("laion2B-en-joined", 3, **scores))
    dataset = make(Select, store, metadata=paths, preset="laion2B-en-256")
    assert kept(dataset) == ["0"] and dataset.manifest.stats.dropped == {f"max_{column}": 2}


@pytest.mark.parametrize("keep_null", [True, False])
def test_a_score_that_is_null_in_the_whole_file(store, make, in_process, metadata, keep_null):
    """Such a column has no type at all: an outer join that found nothing."""
    paths = metadata(table_of("laion2B-en-joined", punsafe=pa.nulls(3), hash=pa.nulls(3)))
    paths += metadata(table_of("laion2B-en-joined", 6, punsafe=[0.1, 0.2, 0.3, 0.4, 0.6, None]), "b.parquet")
    dataset = make(Select, store, metadata=paths, max_punsafe=0.5, keep_null=keep_null)
    rows = [row for entry in dataset.files for row in pq.read_table(dataset.url(entry)).to_pylist()]
    if keep_null:
        assert [row["punsafe"] for row in rows] == [None, None, None, pytest.approx(0.4), None]
        assert dataset.manifest.stats.dropped == {"duplicate_url": 3, "max_punsafe": 1}
    else:
        assert [row["punsafe"] for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0.4])
        assert dataset.manifest.stats.dropped == {"null_punsafe": 4, "max_punsafe": 1}


def test_a_sample_is_told_by_the_url_alone(store, make, in_process, metadata):
    """Whatever file a row lies in and whatever else there is; another seed takes other rows, a larger sample takes more."""
    whole = metadata(table_of("laion2B-en", 4000), "whole.parquet")
    halves = metadata(table_of("laion2B-en", 4000).slice(0, 1500), "x.parquet")
    halves += metadata(table_of("laion2B-en", 4000).slice(1500), "y.parquet")
    tenth = make(Select, store, metadata=whole, sample=0.1)
    rows = set(kept(tenth))
    assert 320 < len(rows) < 480
    assert tenth.manifest.stats.dropped == {"not_sampled": 4000 - len(rows)}
    assert set(kept(make(Select, store, metadata=halves, sample=0.1))) == rows
    assert set(kept(make(Select, store, metadata=whole, sample=0.2))) > rows
    other = set(kept(make(Select, store, metadata=whole, sample=0.1, seed=1)))
    assert 10 < len(other & rows) < 90, "independent samples share a hundredth"
    assert len(kept(make(Select, store, metadata=whole, sample=1.0))) == 4000
