"""Checkpoints between layouts, on disk: lone U-ViTs, whole sets there and back, and what is damaged or missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from tests.unidiffuser.test_generation import PROMPTS, export, noise_image  # noqa: F401
from tests.unidiffuser.test_weights import assert_same, model_of, of_several_types
from unidiffuser.convert_parts import codec_from_official, vae_from_official, vae_to_official
from unidiffuser.encoders import ClipEncoder, ImageLatents
from unidiffuser.generation import UniDiffuser
from unidiffuser.layouts import convert, export_folder, load_uvit, set_layout
from unidiffuser.references import Encoders
from unidiffuser.tensors import WeightsError, read_tensors
from unidiffuser.text_decoder import TextCodec
from unidiffuser.uvit import UViT, UViTConfig
from unidiffuser.weights import load_native, read_native, save_native


@pytest.mark.parametrize("data_type_token", [False, True], ids=["v0", "v1"])
@pytest.mark.parametrize("types", [lambda model: model, UViT.half, of_several_types], ids=["fp32", "fp16", "several"])
def test_a_lone_uvit_goes_round_all_layouts_unchanged(data_type_token, types, tmp_path):
    model = types(model_of(data_type_token))
    save_native(tmp_path / "a", model)
    convert(tmp_path / "a", tmp_path / "b" / "uvit.pth", "official")
    convert(tmp_path / "b" / "uvit.pth", tmp_path / "c", "diffusers")
    assert (tmp_path / "c" / "unet" / "config.json").is_file()
    convert(tmp_path / "c", tmp_path / "d", "native")
    loaded = read_native(tmp_path / "d")
    assert loaded.config == model.config
    assert_same(loaded.state_dict(), model.state_dict())


def test_a_lone_official_uvit_of_another_text_takes_its_tokens_from_the_clip(export, tmp_path):  # noqa: F811
    convert(export / "uvit", tmp_path / "uvit.pth", "official")
    with pytest.raises(WeightsError, match="uvit.pth: .*the position table has .* name the CLIP of its captions"):
        convert(tmp_path / "uvit.pth", tmp_path / "back", "native", heads=2)
    convert(tmp_path / "uvit.pth", tmp_path / "back", "native", heads=2, encoders=Encoders(text="embedded"))
    assert_same(load_native(tmp_path / "back").state_dict(), load_native(export / "uvit").state_dict())


def test_nothing_is_overwritten_and_what_is_no_checkpoint_is_named(tmp_path):
    save_native(tmp_path / "a", model_of())
    with pytest.raises(FileExistsError, match="a exists: choose another name"):
        convert(tmp_path / "a", tmp_path / "a", "diffusers")
    with pytest.raises(FileNotFoundError, match="no U-ViT found"):
        convert(tmp_path / "nothing", tmp_path / "b", "native")
    with pytest.raises(WeightsError, match="a name that ends in .pth"):
        convert(tmp_path / "a", tmp_path / "b", "official")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint; expected an export folder"):
        with export_folder(tmp_path / "a"):
            pass
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="list.pth: expected a dictionary of tensors, found list"):
        load_uvit(tmp_path / "list.pth")


def beside(folder: Path) -> Encoders:
    """What the official files of an export folder leave out: its own other parts."""
    return Encoders(vae=str(folder / "vae"), clip=str(folder / "clip_image"), text=str(folder / "clip_text"), gpt2="embedded")


def state_of(model: UniDiffuser) -> dict[str, torch.Tensor]:
    """Every tensor that sampling uses."""
    text = {name: tensor for name, tensor in model.clip_text.model.text.state_dict().items() if name != "text_projection"}
    parts = {
        "uvit": model.uvit.state_dict(), "vae": model.vae.model.state_dict(), "codec": model.text_codec.state_dict(),
        "clip_image": model.clip_image.model.visual.state_dict(), "clip_text": text,
    }  # fmt: skip
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def assert_sample_alike(one: UniDiffuser, other: UniDiffuser) -> None:
    for task, inputs in (("t2i2t", {"prompts": PROMPTS}), ("i2t", {"images": [noise_image(0)]})):
        a, b = (model.generate(task, **inputs, steps=3, guidance=1.0, beams=2) for model in (one, other))
        assert [result.caption for result in a] == [result.caption for result in b]
        for mine, theirs in zip(a, b, strict=True):
            assert mine.image is None or np.array_equal(np.asarray(mine.image), np.asarray(theirs.image))


@pytest.mark.parametrize("to", ["official", "diffusers"])
def test_a_whole_set_comes_back_to_the_last_bit(export, to, tmp_path):  # noqa: F811
    convert(export, tmp_path / "away", to)
    assert set_layout(tmp_path / "away") == to
    convert(tmp_path / "away", tmp_path / "back", "native", heads=2 if to == "official" else None, encoders=beside(export))
    before, after = UniDiffuser.load(export), UniDiffuser.load(tmp_path / "back")
    assert_same(state_of(before), state_of(after))
    assert_sample_alike(before, after)


@pytest.mark.parametrize("to", ["official", "diffusers"])
@pytest.mark.parametrize("types", [UViT.half, of_several_types], ids=["fp16", "several"])
def test_the_uvit_of_a_whole_set_keeps_its_types(export, to, types, tmp_path):  # noqa: F811
    shutil.copytree(export, tmp_path / "set")
    model = types(load_native(export / "uvit"))
    save_native(tmp_path / "set" / "uvit", model)
    convert(tmp_path / "set", tmp_path / "away", to)
    convert(tmp_path / "away", tmp_path / "back", "native", heads=2 if to == "official" else None, encoders=beside(export))
    assert_same(read_native(tmp_path / "back" / "uvit").state_dict(), model.state_dict())


def test_heads_are_for_official_files_alone_and_are_said_when_those_are_written(export, tmp_path):  # noqa: F811
    save_native(tmp_path / "usual", model_of())
    assert convert(tmp_path / "usual", tmp_path / "usual.pth", "official") is None
    assert convert(export / "uvit", tmp_path / "lone.pth", "official") == 2
    assert convert(export, tmp_path / "official", "official") == 2
    assert convert(tmp_path / "official", tmp_path / "again", "official", heads=2, encoders=beside(export)) == 2
    assert convert(export, tmp_path / "pipeline", "diffusers") is None
    for source in (export, export / "uvit", tmp_path / "pipeline", tmp_path / "pipeline" / "unet"):
        with pytest.raises(ValueError, match="--heads 2 is for official files, which do not tell it; this checkpoint does"):
            convert(source, tmp_path / "back", "native", heads=2)


@pytest.mark.parametrize(
    ("layout", "gone", "uvit"),
    [
        ("official", "caption_decoder.pth", "uvit_v0.pth"),
        ("official", "autoencoder_kl.pth", "uvit_v0.pth"),
        ("native", "text_codec", "uvit"),
        ("native", "vae", "uvit"),
        ("diffusers", "model_index.json", "unet"),
    ],
)
def test_half_a_set_is_not_taken_for_a_lone_uvit(export, layout, gone, uvit, tmp_path):  # noqa: F811
    source = tmp_path / layout
    convert(export, source, layout)
    shutil.rmtree(source / gone) if (source / gone).is_dir() else (source / gone).unlink()
    for to in ("native", "diffusers"):
        with pytest.raises(FileNotFoundError, match=f"{source}: half a set, it lacks {gone}; for the U-ViT alone name .*{uvit}"):
            convert(source, tmp_path / "back", to, heads=2 if layout == "official" else None)
    assert [path.name for path in tmp_path.iterdir()] == [layout]
    beside_clip = {"heads": 2, "encoders": Encoders(text="embedded")} if layout == "official" else {}
    convert(source / uvit, tmp_path / "alone", "native", **beside_clip)
    assert_same(load_native(tmp_path / "alone").state_dict(), load_native(export / "uvit").state_dict())


def test_an_official_uvit_alone_in_its_folder_is_a_lone_one(tmp_path):
    save_native(tmp_path / "a", model_of())
    (tmp_path / "folder").mkdir()
    convert(tmp_path / "a", tmp_path / "folder" / "uvit_v0.pth", "official")
    convert(tmp_path / "folder", tmp_path / "back", "native")
    assert_same(load_native(tmp_path / "back").state_dict(), model_of().state_dict())


def test_a_pipeline_comes_back_to_the_last_bit(export, tmp_path):  # noqa: F811
    convert(export, tmp_path / "pipeline", "diffusers")
    convert(tmp_path / "pipeline", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "again", "diffusers")
    files = sorted(path.relative_to(tmp_path / "pipeline") for path in (tmp_path / "pipeline").rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        assert_same(load_file(tmp_path / "pipeline" / file), load_file(tmp_path / "again" / file))
    for name in ("unet", "text_decoder"):
        one, other = (json.loads((tmp_path / kind / name / "config.json").read_text()) for kind in ("pipeline", "again"))
        assert one == other


def test_a_model_with_a_data_type_token_converts_and_samples(export, tmp_path):  # noqa: F811
    """Its samples are those of data type 1 unless told otherwise, as in diffusers."""
    shutil.copytree(export, tmp_path / "v1")
    config = load_native(export / "uvit").config
    torch.manual_seed(1)
    token = UViT(UViTConfig(**{**config.model_dump(), "data_type_token": True}))
    for parameter in token.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_native(tmp_path / "v1" / "uvit", token)
    convert(tmp_path / "v1", tmp_path / "official", "official")
    assert (tmp_path / "official" / "uvit_v1.pth").is_file()
    convert(tmp_path / "official", tmp_path / "back", "native", heads=2, encoders=beside(export))
    model = UniDiffuser.load(tmp_path / "back")
    assert_same(model.uvit.state_dict(), token.state_dict())
    images = [np.asarray(model.generate("i", steps=3, data_type=kind)[0].image) for kind in (None, 1, 0)]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


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


def test_official_files_have_the_official_names(export, tmp_path):  # noqa: F811
    convert(export, tmp_path / "official", "official")
    official = read_tensors(tmp_path / "official" / "autoencoder_kl.pth")
    own = AutoencoderKL.from_pretrained(export / "vae").state_dict()
    assert_same(vae_from_official(official, own), own)

    codec = TextCodec.load(export / "text_codec")
    decoder = read_tensors(tmp_path / "official" / "caption_decoder.pth")
    assert {"encode_prefix.weight", "decode_prefix.bias", "gpt.transformer.wte.weight"} <= set(decoder)
    parallel = {f"module.{name}": tensor for name, tensor in decoder.items()}
    mask = {"module.gpt.transformer.h.0.attn.bias": torch.ones(1)}
    assert_same(codec_from_official(parallel | mask, codec.state_dict()), codec.state_dict())
    del parallel["module.encode_prefix.bias"]
    with pytest.raises(WeightsError, match=r"1 missing: module.encode_prefix.bias \(8,\)"):
        codec_from_official(parallel, codec.state_dict())


def test_autoencoder_names_are_those_that_diffusers_reads():
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 16, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=2,
    )  # fmt: skip
    official = vae_to_official(vae.state_dict())
    assert official["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert "decoder.up.0.block.0.nin_shortcut.weight" in official
    theirs = convert_ldm_vae_checkpoint(dict(official), dict(vae.config))
    assert_same({name: tensor.reshape(vae.state_dict()[name].shape) for name, tensor in theirs.items()}, vae.state_dict())
    assert_same(vae_from_official(official, vae.state_dict()), vae.state_dict())
