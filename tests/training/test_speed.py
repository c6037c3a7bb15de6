"""FLOPs, peaks and what a row reads off."""

from __future__ import annotations

import psutil
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.peaks import PEAKS, peak_of
from training.speed import gauges, sample_flop
from unidiffuser.modalities import paper_modalities
from unidiffuser.uvit import UViT, UViTConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("token", [False, True])
def test_the_arithmetic_of_a_sample_is_what_torch_counts(token: bool) -> None:
    modalities = paper_modalities((4, 8, 8), 6, (5, 12))
    config = UViTConfig(width=32, depth=4, heads=2, modalities=modalities, data_type_token=token)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = UViT(config)
        x = {part.name: torch.randn(3, *part.shape) for part in model.parts}
        out = model(x, {"image": 300, "text": 700}, torch.zeros(3, dtype=torch.long) if token else None)
        sum(value.sum() for value in out.values()).backward()
    assert sample_flop(config) == pytest.approx(counter.get_total_flops() / 3, rel=1e-9)


def test_the_papers_arithmetic() -> None:
    """By the project's formula of a plan: 1.977 TFLOP a sample at 256 px."""
    config = UViTConfig(modalities=paper_modalities((4, 32, 32)))
    assert sample_flop(config) / 1e12 == pytest.approx(1.977, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5), ("NVIDIA H100 80GB HBM3", 989, 67), ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989, 67), ("NVIDIA L40S", 362, 91.6), ("NVIDIA L4", 121, 30.3), ("NVIDIA A10G", 125, 31.2),
        ("Tesla V100-SXM2-32GB", None, 15.7), ("NVIDIA B200", 2250, 75), ("Some card", None, None),
    ],
)  # fmt: skip
def test_a_device_is_known_by_its_name(name: str, bf16: float | None, fp32: float | None) -> None:
    for precision, tera in (("bf16", bf16), ("fp32", fp32)):
        assert peak_of(name, precision) == (None if tera is None else pytest.approx(tera * 1e12))
    assert all(peak.bf16 == 0 or peak.bf16 > peak.fp32 for peak in PEAKS.values())


def test_a_row_has_tokens_memory_and_on_a_known_gpu_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    config = UViTConfig(modalities=paper_modalities((4, 32, 32)))
    read = gauges(config, "fp32", CPU, 2, False)(10.0)
    resident = psutil.Process().memory_info().rss / 2**30
    assert read == {"tokens_per_s": 3360.0, "memory": pytest.approx(resident, rel=0.2)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    # The paper's: 28 days of 88 A100 at 17.7%, which is 2,458 samples a second at 256 px.
    read = gauges(config, "bf16", torch.device("cuda"), 88, False)(2458.0)
    assert read == {"tokens_per_s": 825888.0, "memory": 3.0, "mfu": pytest.approx(0.177, abs=1e-3)}
    assert "mfu" not in gauges(config, "bf16", torch.device("cuda"), 88, True)(2458.0)
