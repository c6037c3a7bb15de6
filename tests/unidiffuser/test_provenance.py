"""What weights were made from, and their card, go along in every layout and come back; a person's own words stay."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.unidiffuser.test_generation import export  # noqa: F401
from tests.unidiffuser.test_layouts import beside
from unidiffuser.generation import UniDiffuser
from unidiffuser.layouts import convert
from unidiffuser.provenance import card, identity, weights_sha256, write_provenance
from unidiffuser.tensors import WeightsError

SELECT, TRAIN = "a" * 24, "b" * 24
TOLD = {
    "recipe": "mine", "node": "train-256", "stage": "train", "fingerprint": TRAIN, "step": 250, "weights": "ema",
    "commit": "0123456789ab", "package": "0.1.0", "made_from": {"data.birds": "c" * 24}, "config": {"global_batch": 1024},
    "datasets": [
        {"node": "birds-select", "stage": "select", "fingerprint": SELECT, "commit": "0123456789ab", "rows_in": 5000,
         "rows_out": 4000, "dropped": {"too_small": 900, "unsafe": 100}, "made_from": {}},
        {"stage": "encode", "fingerprint": "c" * 24, "made_from": {}},
    ],
}  # fmt: skip


@pytest.fixture
def told(export: Path, tmp_path: Path) -> Path:  # noqa: F811
    """An export folder that says what it was made from."""
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    write_provenance(folder, TOLD)
    return folder


def header(folder: Path) -> dict:
    """The header of a folder's card as the hub's own client reads it."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_every_layout_carries_the_provenance_and_a_card_and_brings_them_back(told, tmp_path):
    loading = {"official": "autoencoder", "diffusers": "UniDiffuserPipeline.from_pretrained", "native": "UniDiffuser.load"}
    source = told
    for layout in ("official", "diffusers", "native"):
        target = tmp_path / layout
        convert(source, target, layout, heads=2 if source.name == "official" else None, encoders=beside(told))
        assert json.loads((target / "provenance.json").read_text()) == TOLD
        found = header(target)
        assert found["library_name"] == ("diffusers" if layout == "diffusers" else "unidiffuser")
        assert found["datasets"] == ["birds"] and found["license"] == "other" and "unidiffuser" in found["tags"]
        text = (target / "README.md").read_text()
        for words in (
            "| birds-select |",
            "5,000 | 4,000 | 900 too_small, 100 unsafe",
            TRAIN,
            '"global_batch": 1024',
            "mine train",
        ):
            assert words in text
        assert loading[layout] in text or layout == "official"
        source = target
    assert (tmp_path / "native" / "README.md").read_text() == (told / "README.md").read_text()
    assert UniDiffuser.load(tmp_path / "official", encoders=beside(told), heads=2).provenance == TOLD


def test_what_a_person_wrote_into_a_card_stays(told, export, tmp_path):  # noqa: F811
    mine = (told / "README.md").read_text().replace("license: other", "license: cc-by-4.0", 1)
    (told / "README.md").write_text(mine)
    convert(told, tmp_path / "pipeline", "diffusers")
    assert (
        header(tmp_path / "pipeline")["license"] == "cc-by-4.0" and header(tmp_path / "pipeline")["library_name"] == "diffusers"
    )
    foreign = Path(shutil.copytree(export, tmp_path / "foreign"))
    (foreign / "README.md").write_text("---\nlicense: mit\n---\nThe model of somebody else.\n")
    convert(foreign, tmp_path / "theirs", "diffusers")
    assert (tmp_path / "theirs" / "README.md").read_text() == (foreign / "README.md").read_text()
    assert not (tmp_path / "theirs" / "provenance.json").exists()


def test_a_set_that_tells_nothing_gets_a_card_that_says_so(export, tmp_path):  # noqa: F811
    convert(export, tmp_path / "pipeline", "diffusers")
    assert "Where these weights come from is not recorded" in (tmp_path / "pipeline" / "README.md").read_text()
    assert header(tmp_path / "pipeline")["library_name"] == "diffusers"
    assert UniDiffuser.load(export).provenance == {}


def test_a_header_that_cannot_be_read_is_written_anew(told, tmp_path):
    (told / "README.md").write_text(card(TOLD, "native").replace("license: other", "license: [", 1))
    convert(told, tmp_path / "pipeline", "diffusers")
    assert header(tmp_path / "pipeline")["license"] == "other"
    (told / "provenance.json").write_text("{")
    with pytest.raises(WeightsError, match="provenance.json: not readable as JSON"):
        convert(told, tmp_path / "other", "diffusers")


def test_the_digest_of_weights_is_that_of_the_files_and_of_nothing_beside_them(told, tmp_path):
    before = weights_sha256(told)
    (told / "README.md").write_text("another card")
    convert(told, told / "diffusers", "diffusers")
    assert weights_sha256(told) == before
    files = sorted(
        path for name in ("uvit", "vae", "clip_image", "clip_text", "text_codec") for path in (told / name).rglob("*.safetensors")
    )
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(str(file.relative_to(told)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    assert len(files) == 6 and digest.hexdigest() == before
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    assert weights_sha256(told) != before


def test_a_sample_carries_what_names_the_checkpoint_and_no_more():
    assert identity(TOLD) == {name: TOLD[name] for name in TOLD if name not in ("package", "config", "datasets")}
    assert identity({**TOLD, "commit": None}).keys() == identity(TOLD).keys() - {"commit"}
    assert identity({}) == {}


def test_a_card_has_the_results_of_the_evaluation_as_a_table_and_as_model_hubs_read_them(told, tmp_path):
    figures = [
        {"name": "fid", "value": 12.5, "samples": 100, "note": "of fewer than 2,048 samples"},
        {"name": "clip score", "value": 3},
        {"measure": "captions", "name": "cider", "value": 0.5},
        {"measure": "clip-score", "name": "clip_score_i2t", "value": 20},
    ]
    write_provenance(told, TOLD | {"evaluation": {"fingerprint": "e" * 24, "figures": figures}})
    convert(told, tmp_path / "pipeline", "diffusers")
    for folder in (told, tmp_path / "pipeline"):
        read = ModelCard.load(folder / "README.md").data.eval_results
        assert [(each.task_type, each.metric_type, each.metric_value) for each in read] == [
            ("text-to-image", "fid", 12.5), ("text-to-image", "clip_score", 3),
            ("image-to-text", "cider", 0.5), ("image-to-text", "clip_score_i2t", 20),
        ]  # fmt: skip
        text = (folder / "README.md").read_text()
        assert "| fid | 12.5 | samples 100, of fewer than 2,048 samples |" in text and "e" * 24 in text
        assert "&id" not in text
    write_provenance(told, TOLD)
    assert ModelCard.load(told / "README.md").data.eval_results is None
