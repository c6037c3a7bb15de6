"""Settings that travel with a CLIP's weights: used whole, or the model is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip import factory
from open_clip.pretrained import _PRETRAINED
from open_clip.transformer import QuickGELU

from tests.unidiffuser.test_clip_preprocess import clip_with
from tests.unidiffuser.test_clip_towers import public_clip
from unidiffuser.clip_settings import clip_preprocess, clip_settings, published
from unidiffuser.encoders import ClipEncoder
from unidiffuser.tensors import WeightsError


def test_every_public_name_has_the_activation_and_the_preprocessing_of_its_weights():
    names = [(name, tag, told) for name, tags in _PRETRAINED.items() for tag, told in tags.items()]
    quick, squashed = [], []
    for name, tag, told in names:
        try:
            settings, preprocess = clip_settings(f"{name}/{tag}"), clip_preprocess(f"{name}/{tag}")
        except WeightsError as error:
            assert f"clip '{name}/{tag}'" in str(error) and ("CoCa" in str(error) or "transformers" in str(error))
            continue
        assert settings.get("quick_gelu", False) == told.get("quick_gelu", False), (name, tag)
        wanted = (tuple(told["mean"]), tuple(told["std"]), told["interpolation"], told["resize_mode"])
        assert (preprocess.mean, preprocess.std, preprocess.interpolation, preprocess.resize_mode) == wanted
        quick += [name] if settings.get("quick_gelu") else []
        squashed += [name] if not preprocess.takes_middle_square else []
    assert len(quick) > 40 and len(squashed) > 40


@pytest.mark.parametrize("tag", ["metaclip_400m", "laion2b_e16"])
def test_what_is_computed_and_what_is_written_have_the_activation_of_the_weights(tag, tmp_path, monkeypatch):
    """With random weights: nothing is fetched."""
    small = json.loads(json.dumps(public_clip().settings))
    del small["quick_gelu"]
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-32", small)
    asked = []

    def fetched(*wanted, revision):
        asked.append((*wanted, revision))
        (tmp_path / "weights.bin").touch()
        return str(tmp_path / "weights.bin")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", fetched)
    monkeypatch.setattr(factory, "load_checkpoint", lambda *_, **__: None)
    public = ClipEncoder.load(f"ViT-B-32/{tag}@{'c' * 40}")
    hub = published(f"ViT-B-32/{tag}")[1]["hf_hub"]
    assert [(f"{repository}/{file}", commit) for repository, file, commit in asked] == [(hub, "c" * 40)]
    public.save(tmp_path / "saved")
    local = ClipEncoder.load(str(tmp_path / "saved"))
    for clip in (public, local):
        towers = (clip.model.visual, clip.model.text)
        found = [any(isinstance(module, QuickGELU) for module in tower.modules()) for tower in towers]
        assert found == [tag == "metaclip_400m"] * 2
        assert clip.settings.get("quick_gelu", False) == found[0]
    pictures = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    assert torch.equal(public.image(pictures), local.image(pictures))


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("coca_ViT-B-32/laion2b_s13b_b90k", "CoCa"),
        ("xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k", "text tower of transformers"),
    ],
)
def test_towers_that_are_not_computed_here_are_refused_before_anything_is_fetched(ref, message):
    with pytest.raises(WeightsError, match=message) as error:
        ClipEncoder.load(ref)
    assert f"clip '{ref}'" in str(error.value)


def test_unknown_weights_are_named_with_those_that_are_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.pt").write_bytes(b"weights without a name")
    for tag in ("openay", "mine.pt"):
        with pytest.raises(OSError, match=f"open_clip knows no weights {tag} of ViT-B-32; it knows openai, "):
            ClipEncoder.load(f"ViT-B-32/{tag}")


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("text_cfg", {"tokenizer_kwargs": {"reduction_mask": "random"}}),
        ("text_cfg", {"output_tokens": True}),
        ("vision_cfg", {"output_tokens": True}),
    ],
)
def test_tokens_that_are_dropped_at_random_or_given_as_well_are_refused(tmp_path, part, setting):
    folder = clip_with(tmp_path / "clip")
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"][part] |= setting
    file.write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="reduction_mask|output_tokens"):
        ClipEncoder.load(str(folder))


@pytest.mark.parametrize("text", [{"no_causal_mask": True}, {"embed_cls": True, "pool_type": "last"}])
def test_a_text_tower_that_looks_behind_the_caption_sees_the_padding_it_was_trained_with(text):
    clip, captions = public_clip(**text), ["a lion", "a small panda"]
    assert torch.equal(clip.ids(captions), open_clip.tokenize(captions))
    assert not torch.equal(public_clip().ids(captions), open_clip.tokenize(captions))


def test_a_tokenizer_comes_back_with_its_cleaning(tmp_path):
    folder = clip_with(tmp_path / "clip")
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    file.write_text(json.dumps(config))
    ClipEncoder.load(str(folder)).save(tmp_path / "saved")
    plain, saved = ClipEncoder.load("embedded"), ClipEncoder.load(str(tmp_path / "saved"))
    assert torch.equal(saved.ids(["A Red, Car!"]), plain.ids(["a red car"]))
    assert not torch.equal(plain.ids(["A Red, Car!"]), plain.ids(["a red car"]))
