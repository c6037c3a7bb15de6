"""Checkpoints between layouts, on disk: lone U-ViTs, export folders, and the official files of the other parts."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from tests.unidiffuser.test_generation import export  # noqa: F401
from tests.unidiffuser.test_weights import assert_same, model_of
from unidiffuser.convert_parts import codec_from_official, vae_from_official, vae_to_official
from unidiffuser.layouts import convert, load_uvit
from unidiffuser.text_decoder import TextCodec
from unidiffuser.weights import WeightsError, load_native, read_tensors, save_native


@pytest.mark.parametrize("data_type_token", [False, True], ids=["v0", "v1"])
def test_a_lone_uvit_goes_round_all_layouts_unchanged(data_type_token, tmp_path):
    model = model_of(data_type_token)
    save_native(tmp_path / "a", model)
    convert(tmp_path / "a", tmp_path / "b" / "uvit.pth", "official")
    convert(tmp_path / "b" / "uvit.pth", tmp_path / "c", "diffusers")
    assert (tmp_path / "c" / "unet" / "config.json").is_file()
    convert(tmp_path / "c", tmp_path / "d", "native")
    loaded = load_native(tmp_path / "d")
    assert loaded.config == model.config
    assert_same(loaded.state_dict(), model.state_dict())


def test_nothing_is_overwritten_and_what_is_no_checkpoint_is_named(tmp_path):
    save_native(tmp_path / "a", model_of())
    with pytest.raises(FileExistsError, match="a exists: choose another name"):
        convert(tmp_path / "a", tmp_path / "a", "diffusers")
    with pytest.raises(FileNotFoundError, match="no U-ViT found"):
        convert(tmp_path / "nothing", tmp_path / "b", "native")
    with pytest.raises(WeightsError, match="a name that ends in .pth"):
        convert(tmp_path / "a", tmp_path / "b", "official")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="list.pth: expected a dictionary of tensors, found list"):
        load_uvit(tmp_path / "list.pth")


def test_an_export_folder_becomes_the_official_files(export, tmp_path):  # noqa: F811
    convert(export, tmp_path / "official", "official")
    tokens = load_native(export / "uvit").config.modalities[1].parts[0].shape[0]
    again = load_uvit(tmp_path / "official", heads=2, text_tokens=tokens)
    assert_same(again.state_dict(), load_native(export / "uvit").state_dict())

    official = read_tensors(tmp_path / "official" / "autoencoder_kl.pth")
    vae = AutoencoderKL.from_pretrained(export / "vae")
    assert_same(vae_from_official(official), vae.state_dict())

    codec = TextCodec.load(export / "text_codec")
    decoder = read_tensors(tmp_path / "official" / "caption_decoder.pth")
    assert {"encode_prefix.weight", "decode_prefix.bias", "gpt.transformer.wte.weight"} <= set(decoder)
    parallel = {f"module.{name}": tensor for name, tensor in decoder.items()}
    mask = {"module.gpt.transformer.h.0.attn.bias": torch.ones(1)}
    assert_same(codec_from_official(parallel | mask), codec.state_dict())


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
    assert_same(vae_from_official(official), vae.state_dict())
