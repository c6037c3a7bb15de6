"""What networks make and cost, as told from their configurations, against the networks themselves."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.planning.encoders import Autoencoder, autoencoder, clip, latents
from pipelines.planning.steps import ROWS, modalities, write_latents
from pipelines.planning.training import trainings
from stages.runner.recipe import load_recipe
from training.loop import uvit_config
from unidiffuser.uvit import UViT


def counted(network: torch.nn.Module, *inputs: torch.Tensor) -> int:
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("attention", [True, False])
def test_an_autoencoders_arithmetic_is_what_torch_counts(attention: bool) -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        made = AutoencoderKL(
            block_out_channels=(8, 16, 24), layers_per_block=2, latent_channels=4, norm_num_groups=4,
            mid_block_add_attention=attention, down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        )  # fmt: skip
        picture = torch.randn(1, 3, 64, 64)
    network = torch.nn.Sequential(made.encoder, made.quant_conv)
    assert Autoencoder((8, 16, 24), 2, 4, attention).flop(64) == pytest.approx(counted(network, picture), rel=1e-3)


def test_a_clips_arithmetic_is_what_torch_counts() -> None:
    from open_clip.model import CustomTextCLIP

    with torch.device("meta"):
        made = CustomTextCLIP(
            embed_dim=64, vision_cfg={"image_size": 96, "patch_size": 16, "layers": 4, "width": 128, "head_width": 32},
            text_cfg={"context_length": 16, "vocab_size": 2000, "width": 128, "heads": 4, "layers": 3},
        )  # fmt: skip
        picture, words = torch.randn(1, 3, 96, 96), torch.zeros(1, 16, dtype=torch.long)
    told = clip("embedded")
    assert told.image.flop == pytest.approx(counted(made.visual, picture), rel=1e-2)
    assert told.text.flop == pytest.approx(counted(made.text, words), rel=1e-2)


def test_the_published_encoders_have_their_known_numbers() -> None:
    vae = autoencoder("stabilityai/sd-vae-ft-mse")
    assert [round(vae.flop(size) / 1e12, 3) for size in (256, 512)] == [0.273, 1.117]
    assert [round(clip(ref).image.flop / 1e9, 1) for ref in ("ViT-B-32/openai",)] == [8.8]
    assert round(clip("ViT-L-14/openai").text.flop / 1e9, 1) == 13.3
    for size, tokens, row in ((256, 336, 27_264), (512, 1104, 76_416)):
        made = latents(size, "stabilityai/sd-vae-ft-mse", "ViT-B-32/openai", "ViT-L-14/openai", 64)
        assert (made.tokens(2, False), made.row_bytes) == (tokens, row)


def test_a_trainings_arithmetic_is_what_torch_counts_of_its_network() -> None:
    training = trainings(load_recipe("configs/demo.yaml"))[0]
    config = training.config.model_copy(update={"model": training.config.model.model_copy(update={"position_side": None})})
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = UViT(uvit_config(config, modalities(training)))
        out = model({part.name: torch.randn(2, *part.shape) for part in model.parts}, {"image": 300, "text": 700})
        sum(value.sum() for value in out.values()).backward()
    assert training.tokens == model.config.tokens
    assert training.sample_flop == pytest.approx(counter.get_total_flops() / 2, rel=1e-9)


def test_a_stored_row_of_latents_takes_what_is_told(tmp_path: Path) -> None:
    training = trainings(load_recipe("configs/paper-v0.yaml"))[0]
    write_latents(training, tmp_path / "latents.parquet")
    latents_alone = pq.read_table(tmp_path / "latents.parquet", columns=["moments", "clip", "text"])
    assert latents_alone.nbytes / ROWS == training.shapes.row_bytes
