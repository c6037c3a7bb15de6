"""encode: embeddings that the filter passes on, and scores that travel into the latents."""

from __future__ import annotations

import io
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from infra.dataset import FileEntry, Manifest, Stats, commit
from infra.store import Store
from stages.encode.stage import SCORES, Encode
from stages.filter.stage import Filter
from stages.runner.contract import Job, StageError
from stages.train.stage import COLUMNS
from tests.stages.packed import blots, cut_between_samples, download, encoded, kept_of, sample
from tests.training.synthetic import config as training
from tests.unidiffuser.test_clip_preprocess import clip_with
from training.heldout import LISTED
from training.index import index_of
from training.latents import LatentReader, Selection
from training.loader import Loader
from training.told import Told
from training.where import Comparison
from unidiffuser.encoders import ClipEncoder, ImageLatents
from unidiffuser.text_decoder import TextCodec

SIZE = 64


def codec_in(store: Store, folder):
    torch.manual_seed(0)
    TextCodec.new("embedded", text_width=128, latent_width=8).save(folder)
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = f"text-codec/units/u/{path.relative_to(folder)}"
        size, digest = store.publish(path, name)
        files.append(FileEntry(path=name, rows=0, bytes=size, sha256=digest, unit="u"))
    manifest = Manifest(
        stage="text-codec", node="text-codec", fingerprint="c" * 24, generation=0, inputs={}, config={}, sources={}, code={},
        schema={}, stats=Stats(), summary={}, seconds=0, created="", files=files,
    )  # fmt: skip
    return commit(store, manifest)


@pytest.fixture
def inputs(tmp_path, store, make, in_process):
    """A filtered dataset of embedded CLIP with an aesthetic head of its own, and a codec."""
    chance = random.Random(1)
    shapes = [(160, 160), (200, 150), (150, 220), (256, 256)]
    samples = [sample(n, encoded(blots(chance, *chance.choice(shapes)))) for n in range(10)]
    torch.save(nn.Linear(64, 1).state_dict(), tmp_path / "linear.pth")
    heads = {"aesthetic": {"weights": str(tmp_path / "linear.pth"), "architecture": "linear"}}
    rows = make(Filter, store, {"rows": download(store, [samples[:6], samples[6:]])}, heads=heads, min_side=None)
    return {"rows": rows, "codec": codec_in(store, tmp_path / "codec")}


def table_of(dataset, *columns):
    tables = [pq.read_table(dataset.url(e), columns=list(columns)) for e in dataset.files if e.name.endswith(".parquet")]
    return [row for table in tables for row in table.to_pylist()]


def test_embeddings_are_passed_on_where_weights_and_arithmetic_are_the_same(store, make, inputs):
    embedded = {row["key"]: np.frombuffer(row["clip"], np.float16) for row in table_of(inputs["rows"], "key", "clip")}
    passed = make(Encode, store, inputs, size=SIZE)
    computed = make(Encode, store, inputs, size=SIZE, precision="fp32")
    clip = ClipEncoder.load("embedded")
    images = {one.key: Image.open(io.BytesIO(one.image)).convert("RGB") for one in kept_of(inputs["rows"])}
    assert len(images) == 10
    for given, own in zip(table_of(passed, "key", "clip"), table_of(computed, "key", "clip"), strict=True):
        square = ImageOps.fit(images[own["key"]], (SIZE, SIZE), Image.Resampling.LANCZOS)
        expected = clip.image([square])[0].numpy()
        assert np.frombuffer(own["clip"], np.float16) == pytest.approx(expected, abs=0.01)
        seen = embedded[given["key"]]
        assert np.frombuffer(given["clip"], np.float16).tolist() == seen.tolist() != expected.astype(np.float16).tolist()
        assert seen @ expected / np.linalg.norm(seen) / np.linalg.norm(expected) > 0.98


@pytest.mark.parametrize(("mode", "same"), [("shortest", True), ("squash", False), ("longest", False)])
def test_embeddings_of_a_clip_that_saw_more_than_the_square_are_not_passed_on(mode, same, store, make, inputs, tmp_path):
    clip = str(clip_with(tmp_path / "clip", resize_mode=mode))
    shards = [list(kept_of(inputs["rows"]))[:3]]
    rows = make(Filter, store, {"rows": download(store, shards)}, clip=clip, min_side=None)
    latents = make(Encode, store, inputs | {"rows": rows}, size=SIZE, clip=clip)
    seen = {row["key"]: row["clip"] for row in table_of(rows, "key", "clip")}
    assert all((row["clip"] == seen[row["key"]]) == same for row in table_of(latents, "key", "clip"))


def test_rows_that_are_not_finite_are_counted_and_left_out(store, make, inputs, monkeypatch):
    def overflowing(self: ImageLatents, images: torch.Tensor) -> torch.Tensor:
        moments = honest(self, images)
        moments[images.float().mean((1, 2, 3)) > middle] = float("nan")
        return moments

    honest = ImageLatents.moments
    squares = {
        one.key: ImageOps.fit(Image.open(io.BytesIO(one.image)).convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS)
        for one in kept_of(inputs["rows"])
    }
    brightness = {key: float(np.asarray(square, np.float32).mean()) for key, square in squares.items()}
    middle = sorted(brightness.values())[5] + 1e-3
    monkeypatch.setattr(ImageLatents, "moments", overflowing)
    latents = make(Encode, store, inputs, size=SIZE)
    stats = latents.manifest.stats
    assert (stats.rows_in, stats.rows_out, stats.dropped) == (10, 6, {"not_finite": 4})
    assert {row["key"] for row in table_of(latents, "key")} == {key for key, bright in brightness.items() if bright <= middle}
    monkeypatch.setattr(ImageLatents, "moments", lambda self, images: honest(self, images) * float("inf"))
    with pytest.raises(StageError, match="no row is left of 10: .*not_finite"):
        make(Encode, store, inputs, size=SIZE, precision="fp32")


def columns_with_dictionary(address):
    group = pq.read_metadata(address).row_group(0)
    return {group.column(n).path_in_schema for n in range(group.num_columns) if group.column(n).has_dictionary_page}


def test_a_heads_score_is_a_threshold_at_training_and_binaries_have_no_dictionary(store, make, inputs):
    latents = make(Encode, store, inputs, size=SIZE)
    job = Job(store, "encode", "x-encode", Encode.Config(size=SIZE), inputs, {}, {})
    assert sum(os.path.getsize(latents.url(entry)) for entry in latents.files) <= Encode.bytes_needed(job), "room was asked for"
    columns = {"key", "caption", "width", "height", *SCORES}
    assert columns_with_dictionary(latents.url(latents.files[0])) == columns
    assert columns_with_dictionary(file_of(inputs["rows"], ".parquet")).isdisjoint({"clip", "phash", "colours"})
    scores = {one.key: one.meta["aesthetic"] for one in kept_of(inputs["rows"])}
    assert {row["key"]: row["aesthetic"] for row in table_of(latents, "key", "aesthetic")} == pytest.approx(scores)
    bound = sorted(scores.values())[4] - 1e-6
    shards = [latents.url(entry) for entry in latents.files]
    index = index_of(LatentReader(shards, Selection((Comparison.parse(f"aesthetic >= {bound}"),), 0.0)))
    assert index.train.sum() == 6
    # What it tells of its shards is what they hold.
    told = [Told(store.url(f"{latents.folder}/files.parquet"), store.root)]
    scanned, listed = (index_of(LatentReader(shards, Selection((), LISTED)), found) for found in ((), told))
    assert scanned.spec == listed.spec and latents.manifest.file_columns == ["groups", "listed", "hashes"]
    for name in ("file", "group", "train", "held"):
        assert getattr(scanned, name).tolist() == getattr(listed, name).tolist()
    assert set(COLUMNS) <= set(latents.manifest.columns), "what a recipe's conditions may name"


def file_of(dataset, ending):
    return dataset.url(next(entry for entry in dataset.files if entry.name.endswith(ending)))


def test_a_shard_that_was_cut_between_samples_is_named_and_makes_nothing(store, make, inputs):
    where = file_of(inputs["rows"], ".tar")
    cut_between_samples(where, 2)
    with pytest.raises(StageError, match=f"^{where}: has 2 samples of 6; `unidiffuser verify` names what is damaged$"):
        make(Encode, store, inputs, size=SIZE)
    assert store.list("encode") == []


def test_a_table_of_embeddings_that_was_cut_is_named(store, make, inputs):
    where = file_of(inputs["rows"], ".parquet")
    os.truncate(where, os.path.getsize(where) // 2)
    with pytest.raises(StageError, match=f"^{where}: .*; `unidiffuser verify` names what is damaged$"):
        make(Encode, store, inputs, size=SIZE)
    assert make(Encode, store, inputs, size=SIZE, precision="fp32").manifest.stats.rows_out == 10, "computes its own"


def test_latents_that_were_cut_before_the_commit_are_named(store, make, inputs):
    latents = make(Encode, store, inputs, size=SIZE)
    store.remove(f"{latents.folder}/manifest.json")
    where = latents.url(latents.files[0])
    os.truncate(where, os.path.getsize(where) // 2)
    with pytest.raises(StageError, match=f"^{where}: .*; delete {os.path.dirname(where)} and run again$"):
        make(Encode, store, inputs, size=SIZE)


def test_further_captions_have_columns_of_their_own_and_are_trained_on(store, make, inputs, in_process):
    def captioned(one, number):
        given = {"alt": f"a drawing of number {number}" if number % 3 else None, "long": " " if number == 4 else f"long {number}"}
        return replace(one, meta=one.meta | {f"caption.{name}": caption for name, caption in given.items()})

    samples = [captioned(one, number) for number, one in enumerate(kept_of(inputs["rows"]))]
    plain = download(store, [samples])
    named = {"columns": {"caption.alt": "string", "caption.long": "string"}, "fingerprint": "d" * 24}
    manifest = plain.manifest.model_copy(update=named)
    latents = make(Encode, store, inputs | {"rows": commit(store, manifest)}, size=2 * SIZE, batch=4)
    rows = {row["key"]: row for row in table_of(latents, "key", "caption", "caption.alt", "text", "text.alt", "text.long")}
    assert len(rows) == 10
    clip = ClipEncoder.load("embedded")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        codec = TextCodec.load(inputs["codec"].fetch(Path(folder))).eval()
        for number, one in enumerate(samples):
            row = rows[one.key]
            own, alt = row["caption"], row["caption.alt"]
            assert (own, alt) == (one.caption, one.meta["caption.alt"])
            assert (row["text.alt"] is None, row["text.long"] is None) == (number % 3 == 0, number == 4)
            for column, caption in (("text", own), ("text.alt", alt), ("text.long", f"long {number}")):
                if row[column] is not None:
                    expected = codec.encode(clip.tokens([caption])).numpy().ravel()
                    assert np.frombuffer(row[column], np.float16) == pytest.approx(expected, abs=0.01)
    assert {"caption.alt", "caption.long", "text.alt", "text.long"} <= set(latents.manifest.columns)
    told = [Told(store.url(f"{latents.folder}/files.parquet"), store.root)]
    shards = [latents.url(entry) for entry in latents.files]
    alt = training(global_batch=10, data={"captions": {"alt": 1.0}}, validation={"fraction": 0.0})
    for known in ((), told):
        loader = Loader(alt, shards, told=known)
        read = [rows[key]["text.alt"] or rows[key]["text"] for key in loader.keys(0)]
        assert loader.batch(0).clean["text"].numpy().astype(np.float16).tobytes() == b"".join(read)
