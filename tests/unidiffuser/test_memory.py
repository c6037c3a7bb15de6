"""Which errors mean that memory is not enough."""

from __future__ import annotations

import pytest
import torch

from unidiffuser.memory import out_of_memory


def test_torchs_own_error_of_a_machines_memory_is_told_from_others() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(raised.value) == "memory"
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert out_of_memory(other.value) is None


def test_the_gpus_is_named() -> None:
    assert out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory")) == "the GPU's memory"
    assert out_of_memory(MemoryError()) == "memory"
