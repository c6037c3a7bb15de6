"""A noise schedule of one's own goes with the model: into sampling, into a pipeline of diffusers and back, and nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from tests.unidiffuser.test_generation import export  # noqa: F401
from unidiffuser.layouts import convert
from unidiffuser.modalities import Modality, Part
from unidiffuser.noise import NoiseConfig
from unidiffuser.sampling import sample
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.tensors import WeightsError
from unidiffuser.uvit import UViT, UViTConfig
from unidiffuser.weights import read_config

OWN = NoiseConfig(beta_start=0.005, beta_end=0.02)


def test_a_schedule_has_diffusers_alphas_and_leaves_what_its_field_says() -> None:
    theirs = DDPMScheduler(beta_start=0.005, beta_end=0.02, beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(NoiseSchedule.of(OWN).alpha_bar[1:], theirs, rtol=1e-3, atol=1e-7)
    left = [float(NoiseSchedule.of(config).alpha_bar[-1].sqrt()) for config in (NoiseConfig(), OWN)]
    assert left == pytest.approx([0.068, 0.0028], abs=1e-3)


def test_sampling_takes_the_models_own_schedule() -> None:
    modalities = (Modality(name="image", parts=(Part(name="x", shape=(3, 8)),)),)
    torch.manual_seed(0)
    drawn = []
    model = UViT(UViTConfig(width=16, depth=2, heads=2, modalities=modalities, noise=OWN)).eval()
    for schedule in (None, NoiseSchedule.of(OWN), NoiseSchedule()):
        drawn.append(sample(model, "i", modalities, 2, 5, 0.0, [0, 1], schedule=schedule)["x"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2], atol=1e-2)


def test_a_pipeline_tells_the_schedule_and_other_layouts_refuse_it(export: Path, tmp_path: Path) -> None:  # noqa: F811
    own = shutil.copytree(export, tmp_path / "own")
    config = read_config(own / "uvit").model_copy(update={"noise": OWN})
    (own / "uvit/config.json").write_text(config.model_dump_json())
    convert(own, tmp_path / "pipeline", "diffusers")
    told = json.loads((tmp_path / "pipeline/scheduler/scheduler_config.json").read_text())
    assert (told["beta_start"], told["beta_end"], told["beta_schedule"]) == (0.005, 0.02, "scaled_linear")
    convert(tmp_path / "pipeline", tmp_path / "back", "native")
    assert read_config(tmp_path / "back/uvit").noise == OWN
    for source, name, layout in (
        (own, "files", "official"), (own / "uvit", "lone.pth", "official"), (own / "uvit", "lone", "diffusers"),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match="trained with noise from 0.005 to 0.02, which no other layout tells"):
            convert(source, tmp_path / name, layout)  # type: ignore[arg-type]
        assert not (tmp_path / name).exists()
