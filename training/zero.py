"""How DeepSpeed's ZeRO keeps and moves what it shards; nothing here changes a result beyond rounding."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from training.section import Section


class ZeroConfig(Section):
    """Memory of the machine instead of the GPU's, and how gradients travel between workers."""

    offload_optimizer: bool = Field(
        False, description="Keep master weights, their average and the optimizer's state in the machine's memory, and step there."
    )
    offload_parameters: bool = Field(
        False, description="With zero_stage 3, keep the weights there too, and fetch each as it is needed."
    )
    fp32_reduction: bool = Field(
        False, description="Add up the workers' gradients in fp32 where they are computed in bf16; twice the bytes on the wire."
    )
    overlap_comm: bool | None = Field(
        None, description="Send gradients while others are computed, for more memory. Default: with zero_stage 3 only."
    )

    @property
    def offloads(self) -> str | None:
        """The field that moves something into the machine's memory, if there is one."""
        return next((name for name in ("offload_optimizer", "offload_parameters") if getattr(self, name)), None)

    def deepspeed(self, pin: bool) -> dict[str, Any]:
        """What DeepSpeed's configuration says of it below `zero_optimization`.

        Args:
            pin: whether what is offloaded is in pinned memory, for a GPU to reach it.
        """
        place = {"device": "cpu", "pin_memory": pin}
        told: dict[str, Any] = {} if self.overlap_comm is None else {"overlap_comm": self.overlap_comm}
        told |= {"offload_optimizer": place} if self.offload_optimizer else {}
        return told | ({"offload_param": place} if self.offload_parameters else {})


def refusal(zero: ZeroConfig, stage: int, optimizer: str, compile: bool) -> str | None:
    """Why these cannot go together, with the field to change; None if they can."""
    if compile and stage == 3:
        return "compile cannot follow zero_stage 3, which gathers weights by hooks; leave compile out, or use zero_stage 2"
    if zero.offload_optimizer and stage == 0:
        return "zero.offload_optimizer has no shards to move with zero_stage 0; use zero_stage 1, 2 or 3"
    if zero.offload_parameters and stage != 3:
        return f"zero.offload_parameters needs zero_stage 3, not {stage}"
    if zero.offloads is not None and optimizer == "muon":
        return f"zero.{zero.offloads} keeps matrices where muon cannot gather them; use optimizer.kind adamw, or leave it out"
    if zero.fp32_reduction and stage == 0:
        return "zero.fp32_reduction is of no use with zero_stage 0, which computes in fp32; leave it out"
    return None
