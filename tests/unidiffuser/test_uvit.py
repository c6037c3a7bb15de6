"""The U-ViT against diffusers' implementation of the published network, with the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel

from unidiffuser.convert import to_diffusers
from unidiffuser.modalities import (
    Modality,
    Part,
    paper_modalities,
    resized,
    token_order,
)
from unidiffuser.uvit import Block, UViT, UViTConfig, plain_attention, resize_positions


def small_config(
    data_type_token: bool = False, latent: tuple[int, int, int] = (4, 8, 8), patch: int = 2, **settings
) -> UViTConfig:
    return UViTConfig(
        width=64,
        depth=4,
        heads=4,
        modalities=paper_modalities(latent, clip=24, text=(7, 16), patch=patch),
        data_type_token=data_type_token,
        **settings,
    )


def inputs(config: UViTConfig, batch: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = {p.name: torch.randn(batch, *p.shape, generator=generator) for p in token_order(config.modalities)}
    return x, {
        "image": torch.tensor([1, 500, 1000][:batch]),
        "text": torch.tensor([0, 999, 3][:batch]),
    }


@pytest.mark.parametrize("data_type_token", [False, True], ids=["v0", "v1"])
@pytest.mark.parametrize(("size", "patch"), [(8, 2), (12, 2), (4, 1), (16, 4)])
def test_outputs_equal_those_of_diffusers(data_type_token, size, patch):
    torch.manual_seed(0)
    config = small_config(data_type_token, (4, size, size), patch)
    model = UViT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    settings, state = to_diffusers(model.state_dict(), config)
    peer = UniDiffuserModel(**{k: v for k, v in settings.items() if not k.startswith("_")}).eval()
    peer.load_state_dict(state)

    x, t = inputs(config)
    data_type = torch.tensor([0, 1, 1]) if data_type_token else None
    with torch.no_grad():
        ours = model(x, t, data_type)
        latent, clip, text = peer(x["latent"], x["clip"][:, None], x["text"], t["image"], t["text"], data_type)
    for name, theirs in {"latent": latent, "clip": clip[:, 0], "text": text}.items():
        torch.testing.assert_close(ours[name], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("data_type_token", "expected"), [(False, 952_504_912), (True, 952_509_520)])
def test_published_number_of_parameters(data_type_token, expected):
    with torch.device("meta"):
        model = UViT(UViTConfig(data_type_token=data_type_token))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_a_hidden_width_comes_back_from_its_ratio():
    for hidden in range(1, 3000, 7):
        with torch.device("meta"):
            assert Block(704, 11, hidden / 704, skip=False).mlp.fc1.out_features == hidden


def test_published_token_order():
    assert [part.name for part in token_order(paper_modalities())] == [
        "text",
        "clip",
        "latent",
    ]
    assert UViTConfig().tokens == 1104


@pytest.mark.parametrize("base", [(8, 8), (4, 16)], ids=["square", "not square"])
def test_another_latent_size_uses_bilinearly_interpolated_positions(base):
    torch.manual_seed(0)
    config = small_config(position_std=0.5, latent=(4, *base))
    model = UViT(config).eval()
    wide = resized(config.modalities, {"latent": (4, 4, 12)})
    x, t = inputs(config.model_copy(update={"modalities": wide}))
    with torch.no_grad():
        out = model(x, t)

        # The same weights in a model declared for the other size, its table interpolated here row by row.
        fixed = UViT(UViTConfig(**{**config.model_dump(), "modalities": wide})).eval()
        table = model.position[0, -16:].reshape(base[0] // 2, base[1] // 2, -1)
        grid = torch.stack([torch.stack([_bilinear(table, 2, 6, r, c) for c in range(6)]) for r in range(2)])
        state = {
            **model.state_dict(),
            "position": torch.cat([model.position[:, :-16], grid.reshape(1, 12, -1)], 1),
        }
        fixed.load_state_dict(state)
        expected = fixed(x, t)
    assert out["latent"].shape == (3, 4, 4, 12)
    for name in out:
        torch.testing.assert_close(out[name], expected[name], atol=1e-5, rtol=1e-5)


def _bilinear(table: torch.Tensor, rows: int, columns: int, row: int, column: int) -> torch.Tensor:
    """One value of ``table`` (h, w, D) resized to rows x columns, with pixel centres aligned as areas."""

    def weights(size: int, new: int, index: int) -> list[tuple[int, float]]:
        place = min(max((index + 0.5) * size / new - 0.5, 0), size - 1)
        low = int(place)
        return [(low, 1 - (place - low)), (min(low + 1, size - 1), place - low)]

    return sum(
        u * v * table[i, j] for i, u in weights(table.shape[0], rows, row) for j, v in weights(table.shape[1], columns, column)
    )


def test_resize_positions_gives_a_model_of_the_new_size_the_same_outputs():
    torch.manual_seed(0)
    old = small_config(position_std=0.5)
    new = small_config(latent=(4, 16, 16))
    model, grown = UViT(old).eval(), UViT(new).eval()
    grown.load_state_dict(resize_positions(model.state_dict(), old, new))
    x, t = inputs(new)
    with torch.no_grad():
        for name, value in model(x, t).items():
            torch.testing.assert_close(grown(x, t)[name], value, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="only the sizes of grids may differ"):
        resize_positions(model.state_dict(), old, small_config(latent=(6, 8, 8)))
    for field, value in {"width": 32, "depth": 6, "heads": 2, "mlp_ratio": 2.0, "data_type_token": True}.items():
        with pytest.raises(ValueError, match=f"only the sizes of grids may differ: {field} .* became {value}"):
            resize_positions(model.state_dict(), old, new.model_copy(update={field: value}))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_activation_checkpointing_computes_every_nth_block_again_and_changes_no_gradient(every):
    torch.manual_seed(0)
    plain = UViT(small_config())
    thrifty = UViT(small_config(activation_checkpointing=every))
    thrifty.load_state_dict(plain.state_dict())
    x, t = inputs(plain.config)
    for model, times in ((plain, 1), (thrifty, 2)):
        calls: list[str] = []
        blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
        for name, module in blocks.items():
            module.register_forward_pre_hook(lambda *_, name=name, calls=calls: calls.append(name))
        sum(out.square().mean() for out in model.train()(x, t).values()).backward()
        order = [name for name in dict.fromkeys(calls) if name in blocks]
        again = {name: times if number % every == 0 else 1 for number, name in enumerate(order)}
        assert {name: calls.count(name) for name in blocks} == again  # once more in the backward pass
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("data_type_token", [False, True], ids=["v0", "v1"])
@pytest.mark.parametrize(
    ("grid", "training"),
    [((8, 8), False), ((12, 12), False), ((4, 12), False), ((4, 12), True)],
    ids=["own size", "another size", "not square", "training, not square"],
)
def test_compiles_without_graph_breaks(data_type_token, grid, training):
    """In training with recomputed activations and a backward pass, as the recipes for large models have it."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = UViT(small_config(data_type_token, activation_checkpointing=2 * training)).train(training)
    x, t = inputs(model.config.model_copy(update={"modalities": resized(model.config.modalities, {"latent": (4, *grid)})}))
    data_type = torch.zeros(3, dtype=torch.long) if data_type_token else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def run(network) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model.zero_grad()
        with torch.set_grad_enabled(training):
            out = network(x, t, data_type)
        if training:
            sum(part.square().mean() for part in out.values()).backward()
        return out, {name: parameter.grad for name, parameter in model.named_parameters() if training}

    for found, expected in zip(run(compiled), run(model), strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_attention_runs_in_the_autocast_type(monkeypatch):
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value):
        seen.append(query.dtype)
        return attention(query, key, value)

    monkeypatch.setattr("unidiffuser.uvit.F.scaled_dot_product_attention", record)
    model = UViT(small_config(latent=(4, 12, 12)))
    x, t = inputs(model.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x, t)
    assert seen == [torch.bfloat16] * 5


def test_wrong_inputs_are_named():
    model = UViT(small_config(data_type_token=True))
    x, t = inputs(model.config)
    with pytest.raises(ValueError, match=r"part clip: expected \(B, 24\), got \(3, 25\)"):
        model({**x, "clip": torch.zeros(3, 25)}, t, 1)
    with pytest.raises(ValueError, match="patches of 2 do not divide 7x8"):
        model({**x, "latent": torch.zeros(3, 4, 7, 8)}, t, 1)
    with pytest.raises(ValueError, match="data_type"):
        model(x, t)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"name": "a", "shape": (4, 7, 8), "patch": 2}], "do not divide"),
        ([{"name": "a", "shape": (4,), "patch": 2}], "only a grid"),
        ([{"name": "a", "shape": (4,)}, {"name": "a", "shape": (2,)}], "must be unique"),
    ],
)
def test_wrong_declarations_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        UViTConfig(
            width=8,
            depth=2,
            heads=1,
            modalities=(Modality(name="m", parts=tuple(Part(**p) for p in parts)),),
        )


def test_attention_written_out_is_torchs():
    query, key, value = torch.randn(3, 2, 4, 25, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(plain_attention(query, key, value), theirs, atol=1e-6)
