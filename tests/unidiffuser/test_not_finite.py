"""What overflows stops with a word, and settings of an autoencoder are honoured or refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.unidiffuser.test_generation import PROMPTS, export, model, noise_image  # noqa: F401
from unidiffuser.encoders import ImageLatents
from unidiffuser.tensors import NotFinite, WeightsError

FEW = {"steps": 2, "beams": 1}


def autoencoder(source: Path, folder: Path, **settings: object) -> str:
    """The autoencoder of an export, with other settings."""
    shutil.copytree(source / "vae", folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return str(folder)


def test_a_network_that_overflows_says_so_instead_of_drawing_black(model):  # noqa: F811
    weight = model.uvit.outputs["latent"].weight
    kept = weight.data.clone()
    try:
        weight.data *= math.inf
        with pytest.raises(
            NotFinite, match="sampling in float32 with guidance 2 gave values of latent, clip that are not finite"
        ):
            model.generate("t2i", prompts=PROMPTS[:1], guidance=2.0, **FEW)
    finally:
        weight.data = kept


def test_an_autoencoder_that_overflows_says_so(model):  # noqa: F811
    latents = torch.full((1, *model.vae.latent_shape(32)), 1e38)
    with pytest.raises(NotFinite, match="the autoencoder decodes to values that are not finite, in float32: take another dtype"):
        model.vae.decode(latents)


def test_an_input_whose_encoding_overflows_is_told(model, monkeypatch):  # noqa: F811
    monkeypatch.setattr(model.vae, "scaling_factor", math.nan)
    with pytest.raises(NotFinite, match="encoding in float32 gave values of latent that are not finite"):
        model.generate("i2t", images=[noise_image(0)], **FEW)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": math.nan}, "guidance must be in 0 .. 100, not nan"),
        ({"guidance": math.inf}, "guidance must be in 0 .. 100, not inf"),
        ({"guidance": -1.0}, "guidance must be in 0 .. 100, not -1"),
        ({"steps": 0}, "steps must be in 1 .. 999, not 0"),
        ({"steps": 1000}, "steps must be in 1 .. 999, not 1000"),
        ({"seeds": [2**64]}, "a seed must be in 0 .. 9223372036854775807, not 18446744073709551616"),
        ({"seeds": [-1]}, "a seed must be in 0 .. 9223372036854775807, not -1"),
    ],
)
def test_numbers_out_of_bounds_are_refused(model, settings, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        model.generate("t2i", prompts=PROMPTS[:1], **settings)


@pytest.mark.parametrize(("upcast", "kind"), [(True, torch.float32), (False, torch.float16)])
def test_force_upcast_is_honoured_in_half_precision(export, tmp_path, upcast, kind):  # noqa: F811
    vae = ImageLatents.load(autoencoder(export, tmp_path / "vae", force_upcast=upcast), dtype=torch.float16)
    assert {weight.dtype for weight in vae.model.parameters()} == {kind}
    if upcast:  # with its whole weights, not with rounded ones
        own = ImageLatents.load(str(export / "vae")).model.state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in vae.model.state_dict().items())


@pytest.mark.parametrize("settings", [{"shift_factor": 0.1159}, {"latents_mean": [0.1] * 4}, {"latents_std": [2.0] * 4}])
def test_latents_that_are_not_only_scaled_are_refused_by_name(export, tmp_path, settings):  # noqa: F811
    folder = autoencoder(export, tmp_path / "vae", **settings)
    with pytest.raises(WeightsError, match=f"vae '{folder}': has {next(iter(settings))} .*only a scaling_factor") as error:
        ImageLatents.load(folder)
    assert "\n" not in str(error.value)
