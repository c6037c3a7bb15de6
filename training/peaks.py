"""What devices compute a second at most, and the arithmetic of training; imports no torch, so that a plan can ask it.

A peak is the vendor's figure for dense matrix products; a device that is not in the table has none, nor has a processor, whose
peak nobody states.
"""

from __future__ import annotations

from typing import NamedTuple


class Peak(NamedTuple):
    """Dense FLOP/s in bf16 with fp32 sums, and in fp32 without TF32, which torch does not use unasked; 0 where there is none."""

    bf16: float
    fp32: float


# By a part of the name that torch.cuda.get_device_name gives; the first that fits counts. Sources: NVIDIA's data sheets of each
# (V100, T4, A10, A100, L4, L40S, H100, H200, HGX B200; of the A10 to L40S, half of what is stated "with sparsity"), NVIDIA's
# "Ada GPU architecture" and "GA102" white papers for the RTX cards, AMD's data sheets of MI250X (one of its two dies) and MI300X.
PEAKS: dict[str, Peak] = {
    "B200": Peak(2250e12, 75e12),
    "H200": Peak(989e12, 67e12),
    "H100 PCIe": Peak(756e12, 51e12),
    "H100 NVL": Peak(835e12, 60e12),
    "H100": Peak(989e12, 67e12),
    "A100": Peak(312e12, 19.5e12),
    "A40": Peak(149.7e12, 37.4e12),
    "A10": Peak(125e12, 31.2e12),
    "L40S": Peak(362e12, 91.6e12),
    "L4": Peak(121e12, 30.3e12),
    "V100": Peak(0, 15.7e12),
    "T4": Peak(0, 8.1e12),
    "RTX 4090": Peak(165.2e12, 82.6e12),
    "RTX 3090": Peak(71e12, 35.6e12),
    "MI300X": Peak(1307e12, 163.4e12),
    "MI250X": Peak(191.5e12, 47.9e12),
}


def peak_of(name: str, precision: str) -> float | None:
    """FLOP/s of a device by its name, in `"bf16"` or `"fp32"`; None where it is not known.

    >>> peak_of("NVIDIA H100 80GB HBM3", "bf16") / 1e12
    989.0
    """
    known = next((peak for part, peak in PEAKS.items() if part in name), None)
    return (getattr(known, precision) or None) if known is not None else None


def training_flop(width: int, depth: int, tokens: int, ends: int, mlp_ratio: float = 4) -> int:
    """FLOP of training on one sample, forward and backward: two a multiplication and addition of every matrix product.

    Of T tokens of width d through L blocks, half of the others of which merge a skip: 6 T (12 d^2 L + d^2 (L - 1)) and, for
    attention, 12 T^2 d L; the layers before and behind the blocks come on top.

    Args:
        tokens: of a sample, timesteps and a data-type token among them.
        ends: of all parts together, tokens times the numbers that each has outside the network.
    """
    blocks = depth + 1
    products = blocks * (4 + 2 * mlp_ratio) * width**2 + depth * width**2
    # The gradient of what goes in is not needed: 4, where it is 6 elsewhere.
    return int(6 * tokens * products + 12 * tokens**2 * width * blocks + (4 + 6) * ends * width)
