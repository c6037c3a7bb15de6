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
from safetensors.torch import load_file

from tests.unidiffuser.test_generation import PROMPTS, export, noise_image  # noqa: F401
from tests.unidiffuser.test_weights import assert_same, model_of, of_several_types
from unidiffuser.convert_parts import codec_from_official, vae_from_official, vae_to_official
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
    for name in ("AutoencoderKL", "VQModel"):  # settings of another network, whichever way its name is sorted
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"_class_name": "{name}"}}')
        with pytest.raises(FileNotFoundError, match="no U-ViT found"):
            load_uvit(tmp_path / name)
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
    with pytest.raises(ValueError, match="data type 2: expected 0 or 1"):
        model.generate("i", steps=1, data_type=2)
    with pytest.raises(ValueError, match="data type 1: this model does not tell types of data apart; leave it out"):
        UniDiffuser.load(export).generate("i", steps=1, data_type=1)


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
