"""Score heads, against the published networks written out with torch.nn and saved under their published names."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unidiffuser.heads import ScoreHead
from unidiffuser.tensors import WeightsError


class Published(nn.Module):
    """LAION's heads keep their layers, dropout included, in a Sequential of this name."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)


def aesthetic_v2() -> Published:
    torch.manual_seed(0)
    return Published(
        nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
        nn.Linear(64, 16), nn.Linear(16, 1),
    ).eval()  # fmt: skip


def saved(folder: Path, network: nn.Module, suffix: str = ".pth") -> Path:
    path = folder / f"head{suffix}"
    if suffix == ".safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_laion_aesthetic_v2_on_the_normalised_embedding(tmp_path: Path, suffix: str) -> None:
    network, seen = aesthetic_v2(), 10 * torch.randn(5, 768)
    head = ScoreHead.load(saved(tmp_path, network, suffix), "laion-aesthetic-v2")
    assert list(network.state_dict())[::2] == [f"layers.{n}.weight" for n in (0, 2, 4, 6, 7)] and head.width == 768
    expected = network.layers(seen / seen.norm(dim=1, keepdim=True))[:, 0]
    torch.testing.assert_close(head(seen), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(head(seen), network.layers(seen)[:, 0], atol=0.1)


def test_laion_aesthetic_v1_is_one_layer(tmp_path: Path) -> None:
    network, seen = nn.Linear(512, 1), torch.randn(4, 512)
    head = ScoreHead.load(saved(tmp_path, network), "linear")
    torch.testing.assert_close(head(seen), network(nn.functional.normalize(seen))[:, 0])


@pytest.mark.parametrize(("activation", "between"), [("relu", nn.ReLU()), ("gelu", nn.GELU()), ("none", nn.Identity())])
def test_a_probability_with_more_than_ten_layers_in_numeric_order(tmp_path: Path, activation, between) -> None:
    torch.manual_seed(1)
    widths = [24, *[16] * 12]
    layers = [part for pair in zip(widths, widths[1:], strict=False) for part in (nn.Linear(*pair), between, nn.Dropout(0.5))]
    network, seen = nn.Sequential(*layers, nn.Linear(16, 1), nn.Sigmoid()).eval(), torch.randn(6, 24)
    head = ScoreHead.load(saved(tmp_path, network), "mlp", activation, sigmoid=True, normalise=False)
    torch.testing.assert_close(head(seen), network(seen)[:, 0])


def test_weights_in_half_precision_compute_in_fp32(tmp_path: Path) -> None:
    network = nn.Linear(32, 1).half()
    seen = torch.randn(3, 32)
    assert ScoreHead.load(saved(tmp_path, network), "linear", normalise=False)(seen).dtype == torch.float32


@pytest.mark.parametrize(
    ("network", "architecture", "words"),
    [
        (nn.Linear(768, 1), "laion-aesthetic-v2", "768 -> 1 is not laion-aesthetic-v2 .768 -> 1024.*name it mlp"),
        (nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1)), "linear", "8 -> 4 -> 1 is 2 layers.*name it mlp"),
        (nn.Linear(8, 2), "linear", "8 -> 2 ends in 2 numbers, expected one score"),
        (nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 1)), "mlp", r"1.weight \(4,\).*is no Linear layer"),
        (nn.Sequential(nn.Linear(8, 4), nn.Linear(5, 1)), "mlp", "1 takes 5 numbers, the layer before it gives 4"),
        (nn.ParameterDict(OrderedDict(a=nn.Parameter(torch.zeros(2)))), "mlp", r"a \(2,\) is no Linear layer"),
        (
            nn.ParameterDict(OrderedDict(weight=torch.zeros(1, 2), scale=torch.ones(2))),
            "mlp",
            r"scale \(2,\).*is no Linear layer",
        ),
        (nn.Sequential(), "mlp", "holds no tensors"),
    ],
)
def test_what_is_no_such_head_is_named(tmp_path: Path, network, architecture, words) -> None:
    with pytest.raises(WeightsError, match=f"head.pth: .*{words}"):
        ScoreHead.load(saved(tmp_path, network), architecture)
