"""Scores that the filter computes by heads on CLIP embeddings: which embedding, which file, and what a dataset counts."""

from __future__ import annotations

import io
import random
import shutil

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from infra.store import Store
from stages.filter.heads import HeadConfig
from stages.filter.stage import Filter, FilterConfig
from stages.runner.contract import StageError
from stages.runner.graph import plan
from stages.runner.recipe import RecipeError, parse_recipe
from tests.stages.packed import ColourClip, blots, download, encoded, kept_of, sample


class SixColours(ColourClip):
    """Another CLIP, with wider embeddings."""

    embed_dim = 6

    def seen(self, pixels):
        seen = super().seen(pixels)
        return torch.cat([seen, 1 - seen], dim=1)


@pytest.fixture(autouse=True)
def clips(monkeypatch):
    known = {"embedded": ColourClip, "six": SixColours}
    monkeypatch.setattr("stages.filter.heads.Scorer.load_clip", lambda self, ref: known[ref](ref))
    for place in ("stage", "heads"):
        monkeypatch.setattr(f"stages.filter.{place}.weights_digest", lambda ref, kind: f"digest of {ref}")


@pytest.fixture
def shards():
    chance = random.Random(0)
    pictures = [encoded(blots(chance)) for _ in range(8)] + [b"broken"]
    return [[sample(n, data, aesthetic=3.0, punsafe=0.25) for n, data in enumerate(pictures)]]


def head(tmp_path, width: int, name: str = "head.pth", seed: int = 0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))
    torch.save(network.state_dict(), tmp_path / name)
    return network, {"weights": str(tmp_path / name), "architecture": "mlp", "activation": "relu"}


def test_a_head_computes_the_score_in_place_of_the_metadatas(tmp_path, store, make, in_process, shards):
    network, config = head(tmp_path, 3)
    unsafe, other = head(tmp_path, 6, "unsafe.pth", seed=1)
    heads = {"aesthetic": config, "punsafe": {**other, "clip": "six", "output": "sigmoid", "normalise": False}}
    dataset = make(Filter, store, {"rows": download(store, shards)}, heads=heads)
    for one in kept_of(dataset):
        seen = ColourClip().image([image_of(one)])
        with torch.no_grad():
            expected = network(nn.functional.normalize(seen)).item()
            probability = unsafe(torch.cat([seen, 1 - seen], dim=1)).sigmoid().item()
        assert one.meta["aesthetic"] == pytest.approx(expected, rel=1e-5)
        assert one.meta["punsafe"] == pytest.approx(probability, rel=1e-5)
    manifest = dataset.manifest
    assert manifest.stats.rows_out == 8 and manifest.columns["aesthetic"] == "float"
    assert manifest.summary["scores"]["aesthetic"]["unknown"] == 1
    names = ["clip", "heads.aesthetic", "heads.punsafe", "heads.punsafe.clip"]
    assert sorted(manifest.sources) == names and str(tmp_path) not in manifest.model_dump_json()


def image_of(one):
    return Image.open(io.BytesIO(one.image)).convert("RGB")


def test_a_threshold_on_a_head_and_no_similarity(tmp_path, store, make, in_process, shards):
    network, config = head(tmp_path, 3)
    scores = [network(nn.functional.normalize(ColourClip().image([image_of(one)]))).item() for one in shards[0][:8]]
    bound = sorted(scores)[4]
    options = {"heads": {"aesthetic": config}, "clip_scores": False, "min_aesthetic": bound - 1e-6}
    dataset = make(Filter, store, {"rows": download(store, shards)}, **options)
    assert [one.key for one in kept_of(dataset)] == [f"{n:08d}" for n, score in enumerate(scores) if score >= bound]
    assert dataset.manifest.stats.dropped == {"undecodable": 1, "min_aesthetic": 4}
    assert all(one.meta["clip_similarity"] is None for one in kept_of(dataset))


def test_weights_count_by_content_and_not_by_path(tmp_path, store, make, in_process, shards, unit_times):
    _, config = head(tmp_path, 3)
    rows = download(store, shards)
    first = make(Filter, store, {"rows": rows}, heads={"aesthetic": config})
    done = unit_times(store, "filter")
    moved = shutil.copy(config["weights"], tmp_path / "moved.pth")
    again = make(Filter, store, {"rows": rows}, heads={"aesthetic": {**config, "weights": str(moved)}})
    assert again.manifest.fingerprint == first.manifest.fingerprint
    _, other = head(tmp_path, 3, "other.pth", seed=2)
    changed = make(Filter, store, {"rows": rows}, heads={"aesthetic": other})
    assert changed.manifest.fingerprint != first.manifest.fingerprint and len(unit_times(store, "filter")) == 2 * len(done)
    activated = make(Filter, store, {"rows": rows}, heads={"aesthetic": {**config, "activation": "gelu"}})
    assert kept_of(activated)[0].meta["aesthetic"] != kept_of(first)[0].meta["aesthetic"]


def test_a_head_for_another_clip_is_named_with_both_widths(tmp_path, store, make, in_process, shards):
    _, config = head(tmp_path, 6)
    words = "heads.aesthetic: .*head.pth takes embeddings of 6 numbers, clip embedded gives 3; .*heads.aesthetic.clip"
    with pytest.raises(StageError, match=words):
        make(Filter, store, {"rows": download(store, shards)}, heads={"aesthetic": config})


@pytest.mark.parametrize(
    ("clip_scores", "clip", "own"), [(True, "six", True), (False, None, True), (False, "six", False), (False, ..., False)]
)
def test_the_filters_own_clip_counts_where_something_is_computed_with_it(tmp_path, clip_scores, clip, own):
    heads = {} if clip is ... else {"aesthetic": {**head(tmp_path, 3)[1], "clip": clip}}
    assert ("clip" in Filter.weights(FilterConfig(clip_scores=clip_scores, heads=heads))) == own


def test_a_file_that_is_no_head_is_named(tmp_path, store, make, in_process, shards):
    torch.save({"conv": torch.zeros(3, 3, 3)}, tmp_path / "conv.pth")
    config = {"weights": str(tmp_path / "conv.pth"), "architecture": "mlp"}
    with pytest.raises(StageError, match="heads.punsafe: .*conv.pth: .*is no Linear layer"):
        make(Filter, store, {"rows": download(store, shards)}, heads={"punsafe": config})


def test_what_is_known_of_an_architecture_cannot_be_said_otherwise():
    known = HeadConfig(weights="v2.pth", architecture="laion-aesthetic-v2")
    assert (known.activation, known.output, known.normalise) == ("none", "raw", True)
    with pytest.raises(ValidationError, match="laion-aesthetic-v2 has activation none"):
        HeadConfig(weights="v2.pth", architecture="laion-aesthetic-v2", activation="relu")
    with pytest.raises(ValidationError, match="heads.beauty"):
        FilterConfig(heads={"beauty": {"weights": "v2.pth", "architecture": "linear"}})


def test_a_recipe_takes_heads_from_its_folder_and_names_a_file_that_is_missing(tmp_path):
    head(tmp_path, 3, "aesthetic.pth")
    (tmp_path / "metadata.parquet").touch()
    heads = {"aesthetic": {"weights": "aesthetic.pth", "architecture": "mlp", "activation": "relu"}}
    subset = {"select": {"metadata": ["metadata.parquet"]}, "download": {}, "filter": {"heads": heads}}
    recipe = parse_recipe({"name": "r", "subsets": {"s": subset}}, tmp_path)
    store = Store(str(tmp_path / "store"))
    assert recipe.nodes["s-filter"].config.heads.aesthetic.weights == str(tmp_path / "aesthetic.pth")
    assert "heads.aesthetic" in plan(recipe, store)["s-filter"].weights
    heads["aesthetic"]["weights"] = "gone.pth"
    with pytest.raises(RecipeError, match="s-filter: .*gone.pth: cannot be read .*heads.aesthetic.weights"):
        plan(parse_recipe({"name": "r", "subsets": {"s": subset}}, tmp_path), store)
