"""The GPUs that a plan can be asked about: their peaks are the trainer's, their memory is the vendor's."""

from __future__ import annotations

from dataclasses import dataclass

from infra.nearest import nearest
from pipelines.commands.checkpoints import Misuse
from training.peaks import PEAKS

# Name on the command line -> its part of a device's name in `training.peaks`, and GB of memory.
GPUS: dict[str, tuple[str, float]] = {
    "a100-80g": ("A100", 80), "a100-40g": ("A100", 40), "h100-80g": ("H100", 80), "h100-pcie": ("H100 PCIe", 80),
    "h100-nvl": ("H100 NVL", 94), "h200": ("H200", 141), "b200": ("B200", 180), "a40": ("A40", 48), "a10": ("A10", 24),
    "l4": ("L4", 24), "l40s": ("L40S", 48), "v100-32g": ("V100", 32), "v100-16g": ("V100", 16), "t4": ("T4", 16),
    "rtx-4090": ("RTX 4090", 24), "rtx-3090": ("RTX 3090", 24), "mi300x": ("MI300X", 192), "mi250x": ("MI250X", 64),
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: bytes of memory, and dense FLOP/s in bf16 (0 where it has none) and in fp32."""

    name: str
    memory: int
    bf16: float
    fp32: float

    def peak(self, precision: str) -> float:
        """FLOP/s in the arithmetic that a training of this `precision` has there; auto is bf16 where there is any."""
        return self.bf16 if precision != "fp32" and self.bf16 else self.fp32

    def half(self, precision: str) -> bool:
        """Whether a training of this `precision` computes in bf16 there."""
        return precision == "bf16" or (precision == "auto" and self.bf16 > 0)


def gpu_of(name: str) -> Gpu:
    """A kind of GPU by name, in any case and with any of ` _-` between its parts.

    Raises:
        Misuse: none has that name; the line lists those that there are.

    >>> gpu_of("A100 80G").bf16 / 1e12
    312.0
    """
    wanted = name.strip().lower().replace(" ", "-").replace("_", "-")
    if wanted not in GPUS:
        raise Misuse(f"--gpu {name}: unknown; expected one of {', '.join(GPUS)}{nearest(wanted, GPUS, 1)}")
    part, memory = GPUS[wanted]
    return Gpu(wanted, int(memory * 1e9), *PEAKS[part])
