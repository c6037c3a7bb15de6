"""Damaged, incomplete and foreign files of checkpoints: named in one line, and nothing is loaded half."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unidiffuser.test_generation import export, noise_image  # noqa: F401
from tests.unidiffuser.test_layouts import beside
from tests.unidiffuser.test_weights import assert_same
from unidiffuser.encoders import ClipEncoder, ImageLatents
from unidiffuser.layouts import convert
from unidiffuser.references import Encoders
from unidiffuser.tensors import WeightsError, read_tensors
from unidiffuser.text_decoder import TextCodec


def test_half_a_clip_says_what_it_lacks(export, tmp_path):  # noqa: F811
    convert(export, tmp_path / "pipeline", "diffusers")
    convert(tmp_path / "pipeline", tmp_path / "native", "native")
    with pytest.raises(ValueError, match="has no text tower"):
        ClipEncoder.load(str(tmp_path / "native" / "clip_image")).text(["a lion"])
    with pytest.raises(ValueError, match="has no image tower"):
        ClipEncoder.load(str(tmp_path / "native" / "clip_text")).image([noise_image(0)])


DAMAGED = {
    "unet": ("diffusion_pytorch_model.safetensors", "vae_img_in.proj.weight"),
    "vae": ("diffusion_pytorch_model.safetensors", "decoder.mid_block.attentions.0.to_q.weight"),
    "image_encoder": ("model.safetensors", "vision_model.embeddings.class_embedding"),
    "text_encoder": ("model.safetensors", "embeddings.token_embedding.weight"),
    "text_decoder": ("diffusion_pytorch_model.safetensors", "encode_prefix.bias"),
}
OFFICIAL = {
    "uvit_v0.pth": "mid_block.attn.qkv.weight",
    "autoencoder_kl.pth": "decoder.mid.attn_1.q.weight",
    "caption_decoder.pth": "encode_prefix.weight",
}
# What is done to a tensor of a file, by what is then said; a tensor more may have a name that looks like its neighbours'.
DAMAGES = {
    "missing": lambda state, name: state.pop(name),
    "extra": lambda state, name: state.update({name.replace("weight", "wait") + ".more": torch.zeros(3)}),
    "of another shape": lambda state, name: state.update({name: torch.zeros(7, 3)}),
}


def write(state: dict[str, torch.Tensor], file: Path) -> None:
    save_file(state, file, {"format": "pt"}) if file.suffix == ".safetensors" else torch.save(state, file)


def assert_damage_is_named(source: Path, file: Path, tensor: str, damage: str, **settings) -> None:
    """Damage one tensor of a file of the set ``source``; converting must name the file and the tensor, and leave nothing."""
    whole = read_tensors(file)
    state = dict(whole)
    DAMAGES[damage](state, tensor)
    write(state, file)
    with pytest.raises(WeightsError) as error:
        convert(source, source.parent / "back", "native", **settings)
    write(whole, file)
    said = str(error.value)
    changed = next((name for name in state if name not in whole), tensor)
    assert str(file if file.suffix == ".pth" else file.parent) in said and damage in said and changed in said, said
    shape = {"missing": tuple(whole[tensor].shape), "extra": (3,), "of another shape": (7, 3)}[damage]
    assert f"{changed} {shape}" in said, said
    assert [path.name for path in source.parent.iterdir()] == [source.name]


@pytest.mark.parametrize("part", DAMAGED)
def test_a_damaged_part_of_a_pipeline_is_named_and_nothing_is_left(export, part, tmp_path):  # noqa: F811
    convert(export, tmp_path / "pipeline", "diffusers")
    name, tensor = DAMAGED[part]
    for damage in DAMAGES:
        assert_damage_is_named(tmp_path / "pipeline", tmp_path / "pipeline" / part / name, tensor, damage)


def test_a_tensor_too_many_has_its_shape_under_any_prefix(export, tmp_path):  # noqa: F811
    """transformers cuts off the prefix that older files have, diffusers' own among them."""
    convert(export, tmp_path / "pipeline", "diffusers")
    file = tmp_path / "pipeline" / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    convert(tmp_path / "pipeline", tmp_path / "back", "native")
    save_file({**state, "text_model.encoder.layers.0.more": torch.zeros(5)}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"text_encoder: tensors 1 extra: .*encoder.layers.0.more \(5,\)"):
        convert(tmp_path / "pipeline", tmp_path / "again", "native")


@pytest.mark.parametrize("file", OFFICIAL)
def test_a_damaged_official_file_is_named_and_nothing_is_left(export, file, tmp_path):  # noqa: F811
    convert(export, tmp_path / "official", "official")
    for damage in DAMAGES:
        source = tmp_path / "official"
        assert_damage_is_named(source, source / file, OFFICIAL[file], damage, heads=2, encoders=beside(export))


def test_an_unreadable_config_is_named(export, tmp_path):  # noqa: F811
    convert(export / "uvit", tmp_path / "lone", "diffusers")
    for text, message in (("{", "unet/config.json: not readable as JSON"), ("[]", "config.json: expected a mapping, found list")):
        (tmp_path / "lone" / "unet" / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=message):
            convert(tmp_path / "lone", tmp_path / "back", "native")


def test_a_part_that_is_missing_is_named(export, tmp_path):  # noqa: F811
    convert(export, tmp_path / "pipeline", "diffusers")
    shutil.rmtree(tmp_path / "pipeline" / "text_encoder")
    with pytest.raises(FileNotFoundError, match="text_encoder/config.json: not found"):
        convert(tmp_path / "pipeline", tmp_path / "back", "native")
    convert(export, tmp_path / "official", "official")
    with pytest.raises(FileNotFoundError, match="nowhere: expected a folder"):
        convert(tmp_path / "official", tmp_path / "back", "native", encoders=Encoders(text="/nowhere", gpt2="embedded"))


def test_wrong_tensors_of_encoders_and_codec_are_named(export, tmp_path):  # noqa: F811
    def copy(part: str, file: str, change) -> Path:
        folder = Path(shutil.copytree(export / part, tmp_path / part, dirs_exist_ok=True))
        state = load_file(folder / file)
        change(state)
        save_file(state, folder / file, metadata={"format": "pt"})
        return folder

    with pytest.raises(WeightsError, match=r"1 missing: .*conv_out.bias.*nothing was loaded"):
        ImageLatents.load(str(copy("vae", "diffusion_pytorch_model.safetensors", lambda s: s.pop("decoder.conv_out.bias"))))
    with pytest.raises(WeightsError, match=r"1 of another shape: projection.bias \(3,\) instead of \(8,\)"):
        TextCodec.load(copy("text_codec", "codec.safetensors", lambda s: s.update({"projection.bias": torch.zeros(3)})))
    shutil.rmtree(tmp_path / "text_codec")
    with pytest.raises(WeightsError, match=r"1 missing: transformer.h.0.ln_1.weight"):
        TextCodec.load(copy("text_codec", "gpt2/model.safetensors", lambda s: s.pop("transformer.h.0.ln_1.weight")))
    for part, file, name, load in (
        ("vae", "diffusion_pytorch_model.safetensors", "decoder.more", lambda folder: ImageLatents.load(str(folder))),
        ("text_codec", "gpt2/model.safetensors", "transformer.more", TextCodec.load),
    ):
        with pytest.raises(WeightsError, match=rf"1 extra: {name} \(5,\)"):
            load(copy(part, file, lambda s, name=name: s.update({name: torch.zeros(5)})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text.ln_final.bias": None}, r"1 missing: text.ln_final.bias \(128,\)"),
        ({"text.positional_embedding": (32, 128)}, r"text.positional_embedding \(32, 128\) instead of \(16, 128\)"),
        ({"visual.positional_embedding": (10, 128)}, r"visual.positional_embedding \(10, 128\) instead of \(37, 128\)"),
        ({"visual.positional_embedding": (37, 64)}, r"visual.positional_embedding \(37, 64\) instead of \(37, 128\)"),
        ({"logit_bias": ()}, r"1 extra: logit_bias \(\)"),
        ({"text.more": (5,)}, r"1 extra: text.more \(5,\)"),
    ],
)
def test_wrong_tensors_of_a_clip_are_named(export, change, message, tmp_path):  # noqa: F811
    folder = shutil.copytree(export / "clip_text", tmp_path / "clip_text")
    state = load_file(folder / "open_clip_model.safetensors")
    for name, shape in change.items():
        state[name] = torch.zeros(shape or ())
        if shape is None:
            del state[name]
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match=f"clip_text/open_clip_model.safetensors: tensors .*{message}.*; nothing was loaded"):
        ClipEncoder.load(str(folder))


def test_a_clip_of_older_names_loads_without_a_word(export, tmp_path, caplog):  # noqa: F811
    """As open_clip saved models once: the text tower without a prefix, and an axis for the scale."""
    folder = shutil.copytree(export / "clip_text", tmp_path / "clip_text")
    state = load_file(folder / "open_clip_model.safetensors")
    older = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    older["logit_scale"] = older["logit_scale"].reshape(1)
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(older, folder / "open_clip_pytorch_model.bin")
    assert_same(ClipEncoder.load(str(folder)).model.state_dict(), ClipEncoder.load(str(export / "clip_text")).model.state_dict())
    assert not caplog.records


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_head_that_is_not_the_embedding_is_refused(export, layout, tmp_path):  # noqa: F811
    source = tmp_path / layout
    convert(export, source, layout)
    name, head = {
        "official": ("caption_decoder.pth", "gpt.lm_head.weight"),
        "diffusers": ("text_decoder/diffusion_pytorch_model.safetensors", "transformer.lm_head.weight"),
    }[layout]
    state = read_tensors(source / name)
    write({**state, head: state[head] + 1}, source / name)
    settings = {"heads": 2, "encoders": beside(export)} if layout == "official" else {}
    with pytest.raises(
        WeightsError, match=f"{name.split('/')[0]}: .*{head} differs from .*wte.weight, GPT-2 has one tensor for both"
    ):
        convert(source, tmp_path / "back", "native", **settings)
    assert not (tmp_path / "back").exists()


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


UNREADABLE = {
    "native": {
        "clip_text/open_clip_model.safetensors": (shorten, "damaged, or of another kind .*; fetch or write it again"),
        "clip_image/open_clip_config.json": ("{", "not readable as JSON .*; fetch or write it again"),
        "clip_text/open_clip_config.json": ("{}", "expected a model_cfg with embed_dim, vision_cfg, text_cfg"),
        "clip_text/tokenizer.json": (shorten, "damaged, or of another kind"),
        "text_codec/codec.json": ('{"text_width": 128}', "text_width is 128 and latent_width None, expected whole numbers"),
        "text_codec/gpt2/model.safetensors": (shorten, "not a readable safetensors file"),
        "text_codec/gpt2/config.json": ("[]", "expected a mapping, found list"),
        "text_codec/gpt2/tokenizer.json": (shorten, "damaged, or of another kind"),
        "vae/diffusion_pytorch_model.safetensors": (shorten, "not a readable safetensors file"),
        "vae/config.json": ("[]", "expected a mapping, found list"),
        "uvit/config.json": (shorten, "the file: Invalid JSON"),
    },
    "diffusers": {
        "text_encoder/model.safetensors": (shorten, "not a readable safetensors file"),
        "image_encoder/model.safetensors": (shorten, "not a readable safetensors file"),
        "image_encoder/config.json": ('{"hidden_size": "x"}', "damaged, or of another kind"),
        "clip_tokenizer": (shutil.rmtree, "not found; a pipeline of diffusers has it"),
        "clip_image_processor": (shutil.rmtree, "not found; a pipeline of diffusers has it"),
        "text_tokenizer": (shutil.rmtree, "not found; a pipeline of diffusers has it"),
        "text_tokenizer/tokenizer.json": (shorten, "damaged, or of another kind"),
    },
}


@pytest.mark.parametrize("layout", UNREADABLE)
def test_what_cannot_be_read_is_named_in_a_line(export, layout, tmp_path):  # noqa: F811
    source = tmp_path / layout
    convert(export, source, layout)
    for name, (change, message) in UNREADABLE[layout].items():
        changed = shutil.copytree(source, tmp_path / "changed")
        change(changed / name) if callable(change) else (changed / name).write_text(change)
        place = changed / name
        # Of a tokenizer, and of settings that a model refuses, the folder is named.
        place = place.parent if message.startswith("damaged") and "open_clip" not in name else place
        with pytest.raises((WeightsError, FileNotFoundError), match=f"^{place}: {message}") as error:
            convert(changed, tmp_path / "back", "diffusers" if layout == "native" else "native")
        assert "\n" not in str(error.value)
        shutil.rmtree(changed)
    assert [path.name for path in tmp_path.iterdir()] == [layout]
