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
from unidiffuser.weights import load_native, read_native, save_native


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
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


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


@pytest.mark.parametrize(
    ("width", "heads", "message"),
    [
        (32, None, "a width of 32 is no multiple of 64: give the number of attention heads"),
        (200, None, "a width of 200 is no multiple of 64: give the number of attention heads"),
        (128, 3, "a width of 128 is no multiple of 3: give the number of attention heads"),
        (128, -2, "sizes that no U-ViT has: .*greater than 0"),
    ],
)
def test_heads_that_cannot_be_are_refused(width, heads, message):
    model = model_of(width=width, depth=2, heads=2)
    official = to_official(model.state_dict(), model.config)
    with pytest.raises(WeightsError, match=message):
        from_official(official, heads=heads)
    assert from_official(official, heads=2)[0] == model.config


def test_what_other_layouts_cannot_hold_is_refused():
    wide = model_of(modalities=paper_modalities((4, 8, 18), clip=24, text=(77, 16)))  # 4 x 9 patches: as many as 6 x 6
    for there in (to_diffusers, to_official):
        with pytest.raises(WeightsError, match=r"square latents, not \(4, 8, 18\)"):
            there(wide.state_dict(), wide.config)
    sound = model_of(modalities=(Modality(name="sound", parts=(Part(name="waves", shape=(9,)),)),))
    with pytest.raises(WeightsError, match="this model has .*sound"):
        to_official(sound.state_dict(), sound.config)
    with pytest.raises(WeightsError, match="not a published U-ViT: patch_embed.proj.weight, pos_embed, .* missing"):
        from_official({"other.weight": torch.zeros(2)})
    thick = model_of(mlp_ratio=2)
    with pytest.raises(WeightsError, match="an MLP ratio of 4, not 2"):
        to_diffusers(thick.state_dict(), thick.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu', the published U-ViT has 'gelu'"),
        ({"num_text_tokens": None}, "config.json: num_text_tokens is None, expected a whole number"),
        ({"attention_head_dim": "64", "num_layers": 4.5}, "attention_head_dim is '64', num_layers is 4.5, expected"),
        ({"num_layers": 3}, "sizes that no U-ViT has: .*depth must be even"),
        ({"patch_size": 4}, "sizes that no U-ViT has: .*patches of 4 do not divide 6x6"),
    ],
)
def test_settings_of_another_network_are_refused(changes, message):
    settings, state = to_diffusers(model_of().state_dict(), model_of().config)
    with pytest.raises(WeightsError, match=message):
        from_diffusers({**settings, **changes}, state)


DIFFUSERS_BLOCK = "transformer.transformer_mid_block.attn1"


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("official", ("clip_img_out.bias", None), r"1 missing: clip_img_out.bias \(24,\)"),
        ("official", ("inputs.latent.weight", (3,)), r"1 extra: inputs.latent.weight \(3,\)"),
        ("official", ("in_blocks.0.attn.qkv.weight", (5, 5)), r"in_blocks.0.attn.qkv.weight \(5, 5\) instead of \(384, 128\)"),
        ("official", ("text_embed.weight", (3,)), r"text_embed.weight \(3,\): another number of axes"),
        ("official", ("text_embed.bias", torch.int64), r"1 of whole numbers: text_embed.bias \(128,\) int64; nothing was loaded"),
        ("official", ("pos_embed", (1, 88, 128)), r"pos_embed \(1, 88, 128\): the position table has 88 rows"),
        ("diffusers", ("vae_img_in.proj.bias", None), r"1 missing: vae_img_in.proj.bias \(128,\)"),
        ("diffusers", (f"{DIFFUSERS_BLOCK}.to_k.weight", None), rf"1 missing: {DIFFUSERS_BLOCK}.to_k.weight \(128, 128\)"),
        ("diffusers", (f"{DIFFUSERS_BLOCK}.to_q.bias", (3,)), rf"1 extra: {DIFFUSERS_BLOCK}.to_q.bias \(3,\)"),
        ("diffusers", ("lone", (2,)), r"1 extra: lone \(2,\)"),
        ("diffusers", ("pos_embed", torch.int64), r"1 of whole numbers: pos_embed \(1, 89, 128\) int64"),
        ("diffusers", (f"{DIFFUSERS_BLOCK}.to_v.weight", (9, 128)), rf"{DIFFUSERS_BLOCK}.to_v.weight \(9, 128\) instead of"),
    ],
)
def test_wrong_tensors_of_other_layouts_have_the_names_of_their_file(layout, change, message):
    model, (name, shape) = model_of(), change
    settings, state = to_diffusers(model.state_dict(), model.config)
    if layout == "official":
        state = to_official(model.state_dict(), model.config)
    if shape is None:
        del state[name]
    elif isinstance(shape, torch.dtype):
        state[name] = state[name].to(shape)
    else:
        state[name] = torch.zeros(shape)
    with pytest.raises(WeightsError, match=message):
        from_official(state) if layout == "official" else from_diffusers(settings, state)


def test_native_folder_there_and_back(tmp_path):
    model = model_of(data_type_token=True, position_std=0.5, activation_checkpointing=True).half()
    save_native(tmp_path, model)
    loaded = load_native(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert_same(loaded.state_dict(), model.state_dict())


def of_several_types(model: UViT) -> UViT:
    """A model whose position table and norm have another type than the rest, with values that only these types hold."""
    model.position = torch.nn.Parameter(model.position.detach().half())
    model.norm.weight = torch.nn.Parameter(torch.rand_like(model.norm.weight, dtype=torch.float64))
    model.norm.bias = torch.nn.Parameter(model.norm.bias.detach().bfloat16())
    return model


def test_a_model_of_several_types_loads_in_the_widest(tmp_path):
    model = of_several_types(model_of())
    save_native(tmp_path, model)
    assert_same(read_native(tmp_path).state_dict(), model.state_dict())
    assert_same(load_native(tmp_path).state_dict(), {name: tensor.double() for name, tensor in model.state_dict().items()})
    model.norm.weight = torch.nn.Parameter(model.norm.weight.detach().to(torch.float8_e4m3fn))
    save_native(tmp_path, model)
    assert_same(load_native(tmp_path).state_dict(), {name: tensor.float() for name, tensor in model.state_dict().items()})


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
