"""In which arithmetic Muon iterates: in bf16 where the devices of all workers have it, else in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.training.synthetic import config, write_shards
from tests.training.test_optimizers import CPU, job, muon, train_losses
from training import arithmetic
from training.loop import run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize(("has", "like"), [(True, "bf16"), (False, "fp32")])
def test_muon_iterates_in_bf16_where_the_device_has_it(
    alone: None, shards: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool, like: str
) -> None:
    monkeypatch.setattr(arithmetic, "has_bf16", lambda device: has)
    for name in ("auto", like):
        run(job(tmp_path / name, shards, config(steps=2, zero_stage=3, optimizer=muon(name))), CPU)
    assert train_losses(tmp_path / "auto" / "2") == train_losses(tmp_path / like / "2")
    assert (tmp_path / "auto/2/model.safetensors").read_bytes() == (tmp_path / f"{like}/2/model.safetensors").read_bytes()


def test_one_worker_without_bf16_has_all_iterate_in_fp32(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "has_bf16", lambda device: True)
    assert arithmetic.all_have_bf16(CPU)
    monkeypatch.setattr(arithmetic.dist, "all_reduce", lambda have, op: have.mul_(0) if op == dist.ReduceOp.MIN else None)
    assert not arithmetic.all_have_bf16(CPU)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel does not tell what the processor can")
def test_bf16_is_what_the_kernel_says_of_the_processor() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert arithmetic.has_bf16(CPU) == bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
