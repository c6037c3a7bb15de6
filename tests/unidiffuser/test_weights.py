"""Weights: native folders, the official and diffusers' layouts there and back, and damaged files."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel

from unidiffuser.convert import from_diffusers, from_official, save_diffusers, to_diffusers, to_official
from unidiffuser.modalities import Modality, Part, paper_modalities
from unidiffuser.tensors import WeightsError, read_tensors
from unidiffuser.uvit import UViT, UViTConfig
from unidiffuser.weights import load_native, save_native


def model_of(data_type_token: bool = False, **settings) -> UViT:
    torch.manual_seed(0)
    config = {
        "width": 128,
        "depth": 4,
        "heads": 2,
        "modalities": paper_modalities((4, 6, 6), clip=24, text=(77, 16)),
        "data_type_token": data_type_token,
        **settings,
    }
    return UViT(UViTConfig(**config))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("data_type_token", [False, True], ids=["v0", "v1"])
def test_official_layout_there_and_back(data_type_token, tmp_path):
    model = model_of(data_type_token)
    torch.save(to_official(model.state_dict(), model.config), tmp_path / "uvit.pth")
    official = read_tensors(tmp_path / "uvit.pth")
    ends = {"pos_embed", "patch_embed.proj.weight", "clip_img_embed.bias", "text_embed.weight", "decoder_pred.weight",
            "clip_img_out.bias", "text_out.weight", "norm.weight", "in_blocks.1.attn.qkv.weight",
            "mid_block.mlp.fc1.bias", "out_blocks.0.skip_linear.weight", "out_blocks.1.norm1.bias"}  # fmt: skip
    assert ends <= set(official)
    assert ({"pos_embed_token", "token_embedding.weight"} <= set(official)) == data_type_token
    config, state = from_official(official)
    assert config == model.config
    assert_same(state, model.state_dict())


@pytest.mark.parametrize("data_type_token", [False, True], ids=["v0", "v1"])
def test_diffusers_layout_there_and_back(data_type_token, tmp_path):
    model = model_of(data_type_token)
    save_diffusers(tmp_path, model.state_dict(), model.config)
    peer, loading = UniDiffuserModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    config, state = from_diffusers(dict(peer.config), peer.state_dict())
    assert config == model.config
    assert_same(state, model.state_dict())


def test_heads_and_text_tokens_can_be_told():
    model = model_of(heads=4, modalities=paper_modalities((4, 6, 6), clip=24, text=(20, 16)))
    official = to_official(model.state_dict(), model.config)
    assert from_official(official, heads=4, text_tokens=20)[0] == model.config
    with pytest.raises(WeightsError, match="has 32 rows; less 2 timesteps, 1 CLIP and 77 text tokens"):
        from_official(official)


def test_what_other_layouts_cannot_hold_is_refused():
    wide = model_of(modalities=paper_modalities((4, 6, 8), clip=24, text=(77, 16)))
    with pytest.raises(WeightsError, match="square latents"):
        to_diffusers(wide.state_dict(), wide.config)
    sound = model_of(modalities=(Modality(name="sound", parts=(Part(name="waves", shape=(9,)),)),))
    with pytest.raises(WeightsError, match="this model has .*sound"):
        to_official(sound.state_dict(), sound.config)
    with pytest.raises(WeightsError, match="not a published U-ViT: patch_embed.proj.weight, pos_embed, .* missing"):
        from_official({"other.weight": torch.zeros(2)})
    settings, state = to_diffusers(model_of().state_dict(), model_of().config)
    with pytest.raises(WeightsError, match="activation_fn is 'geglu', the published U-ViT has 'gelu'"):
        from_diffusers({**settings, "activation_fn": "geglu"}, state)


def test_native_folder_there_and_back(tmp_path):
    model = model_of(data_type_token=True, position_std=0.5, activation_checkpointing=True).half()
    save_native(tmp_path, model)
    loaded = load_native(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert_same(loaded.state_dict(), model.state_dict())


def test_wrong_tensors_are_named_and_nothing_is_loaded(tmp_path):
    model = model_of()
    save_native(tmp_path, model)
    state = model.state_dict()
    state["extra.weight"] = torch.zeros(2)
    state["norm.bias"] = torch.zeros(5)
    del state["mid_block.norm2.bias"]
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        load_native(tmp_path)
    for words in ("1 missing: mid_block.norm2.bias (128,)", "1 extra: extra.weight (2,)",
                  "norm.bias (5,) instead of (128,)", "nothing was loaded", str(tmp_path)):  # fmt: skip
        assert words in str(error.value)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json: not found"):
        load_native(tmp_path)
    save_native(tmp_path, model_of())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="model.safetensors: not a readable safetensors file"):
        load_native(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(WeightsError, match="config.json: .*depth must be even"):
        load_native(tmp_path)


def test_pickles_that_run_code_are_not_read(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"pos_embed": Harmful()}, tmp_path / "uvit.pth")
    with pytest.raises(WeightsError, match="not a readable file of plain tensors"):
        read_tensors(tmp_path / "uvit.pth")
    assert not (tmp_path / "written").exists()
