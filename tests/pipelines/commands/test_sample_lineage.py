"""What samples say of their checkpoint, and that the library finds datasets as the command does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.dataset import find, verify
from infra.store import Store
from tests.pipelines.commands.test_sampling import FEW, rows_of, say, store  # noqa: F401
from tests.stages.committed import dataset_of
from tests.unidiffuser.test_generation import export  # noqa: F401
from tests.unidiffuser.test_provenance import TOLD
from unidiffuser.generation import UniDiffuser
from unidiffuser.provenance import identity, weights_sha256, write_provenance
from unidiffuser.references import Encoders

EXPORT = "6578706f72746578706f7274"


def test_samples_carry_the_lineage_of_their_checkpoint(export, store, tmp_path, say):  # noqa: F811
    train, codec, encode = (find(store, stage, (stage.encode().hex() * 4)[:24]) for stage in ("train", "text-codec", "encode"))
    lineage = {
        "recipe": "mine", "node": "x-train", "stage": "train", "fingerprint": train.manifest.fingerprint, "weights": "ema",
        "made_from": {"data.little": encode.manifest.fingerprint, "codec": codec.manifest.fingerprint},
    }  # fmt: skip
    beside = ("--store", store.root, "--vae", export / "vae")
    assert say("convert", "train/74726169", tmp_path / "native", "--to", "native", *beside)[0] == 0
    assert say("convert", tmp_path / "native", tmp_path / "pipeline", "--to", "diffusers")[0] == 0
    for checkpoint, more in (("train/74726169", beside), (tmp_path / "native", ()), (tmp_path / "pipeline", ()), (export, ())):
        out = tmp_path / "out" / Path(checkpoint).name
        code, _, complaint = say("sample", checkpoint, *more, "--task", "joint", *FEW, "--out", out)
        assert code == 0, complaint
        (row,) = rows_of(out)
        assert json.loads(Image.open(out / "00000.png").text["lineage"]) == row["lineage"]
        digest = row["lineage"].pop("sha256", None)
        assert row["lineage"] == ({} if checkpoint == export else lineage)
        # A folder's files may be others than they were: their own digest says which.
        assert digest == (None if more else weights_sha256(Path(checkpoint)))


def test_an_export_is_named_beside_the_training_that_it_is_of(export, store, tmp_path, say):  # noqa: F811
    def lineage_of(place: Store) -> dict:
        code, printed, complaint = say("sample", "6578706f", "--store", place.root, "--task", "t", *FEW, "--json")
        assert code == 0, complaint
        return json.loads(printed)["lineage"]

    # Older exports know nothing of themselves: their manifest does.
    own = {"node": "x-export", "stage": "export", "fingerprint": EXPORT, "export": EXPORT, "made_from": {}}
    assert lineage_of(store) == own
    folder = Path(shutil.copytree(export, tmp_path / "told"))
    write_provenance(folder, TOLD)
    newer = Store(str(tmp_path / "newer"))
    dataset = dataset_of(newer, "export", folder, {})
    assert lineage_of(newer) == identity(TOLD) | {"export": EXPORT}
    assert verify(dataset) == []


def test_the_library_loads_datasets_by_their_fingerprint(export, store, say, monkeypatch):  # noqa: F811
    few = {"steps": 2, "beams": 1}
    here = Encoders(vae=str(export / "vae"), clip="embedded", text="embedded", gpt2="embedded")
    (expected,) = UniDiffuser.load(export).generate("i", **few)
    for checkpoint, more in (
        ("6578706f", {}),
        (store.url("export/6578706f72746578706f7274"), {}),
        ("train/74726169", {"encoders": here}),
    ):
        model = UniDiffuser.load(checkpoint, store=store.root, **more)
        assert np.array_equal(np.asarray(model.generate("i", **few)[0].image), np.asarray(expected.image))
    assert model.provenance["fingerprint"] == "747261696e747261696e7472"
    monkeypatch.setenv("UNIDIFFUSER_STORE", store.root)
    assert UniDiffuser.load("6578706f").size == 32
    with pytest.raises(FileNotFoundError, match="0123abcd: no dataset in"):
        UniDiffuser.load("0123abcd")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint; expected an export folder"):
        UniDiffuser.load(export / "vae")
