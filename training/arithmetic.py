"""In which arithmetic a device computes by itself, and not by what stands for it."""

from __future__ import annotations

import torch
import torch.distributed as dist

# As torch names the instructions: of Intel's and AMD's processors, and of ARM's.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16. A processor that does not takes twenty to forty times as long as in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in BF16_INSTRUCTIONS)


def all_have_bf16(device: torch.device) -> bool:
    """The same of the devices of all workers; all of them must call it, each with its own."""
    have = torch.tensor(has_bf16(device), dtype=torch.int32, device=device)
    dist.all_reduce(have, op=dist.ReduceOp.MIN)
    return bool(have)
