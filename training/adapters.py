"""LoRA (arXiv 2106.09685): adapters of low rank beside frozen linear layers, W x + alpha / rank * B A x.

Only A and B are trained. They are peft's, and so is the form in which they lie in a checkpoint:

    adapter_config.json, adapter_model.safetensors    what `peft.PeftModel.from_pretrained` reads
    adapter_ema.safetensors                           their moving average

Beside them lie model.safetensors and ema.safetensors as of every checkpoint, with the adapters merged in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor, nn

from training.config import LoraConfig
from training.weights import ForeignWeights

if TYPE_CHECKING:
    import peft

# How peft calls an adapter within a module, and before a name in a file.
NAME, PREFIX = ".default.", "base_model.model."
A, B = ".lora_A.default.weight", ".lora_B.default.weight"


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter.

    >>> is_adapter("mid_block.attn.qkv.lora_A.default.weight"), is_adapter("mid_block.attn.qkv.base_layer.weight")
    (True, False)
    """
    return name.endswith((A, B))


def in_file(name: str) -> str:
    """The name of an adapter's parameter in peft's files."""
    return PREFIX + name.replace(NAME, ".")


class Adapters:
    """The adapters of a run on the weights that it starts from."""

    def __init__(self, config: LoraConfig, base: ForeignWeights) -> None:
        self.config, self.base = config, base

    def _peft(self) -> peft.LoraConfig:
        import peft

        return peft.LoraConfig(r=self.config.rank, lora_alpha=self.config.alpha, target_modules=list(self.config.targets))

    def inject(self, model: nn.Module) -> None:
        """Put adapters into a model, which computes as before since B is 0, and freeze all else."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(self._peft(), model)

    def write(self, folder: Path, kind: str, tensors: dict[str, Tensor]) -> None:
        """Write adapters by the names of their parameters as the `kind` (model or ema) of a checkpoint, apart and merged."""
        save_file({in_file(name): tensor for name, tensor in tensors.items()}, folder / f"adapter_{kind}.safetensors")
        save_file(self.merged(tensors), folder / f"{kind}.safetensors")
        self._peft().save_pretrained(str(folder))
        file = folder / "adapter_config.json"
        told = json.loads(file.read_text(encoding="utf-8"))
        # peft writes the set of targets in any order.
        told["target_modules"] = sorted(told["target_modules"])
        file.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def merged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All weights of the model in fp32, those with an adapter as W + alpha / rank * B A."""
        state = {name: self.base.tensor(name) for name in self.base.names()}
        for name, down in tensors.items():
            if name.endswith(A):
                module = name.removesuffix(A)
                state[f"{module}.weight"] += self.config.alpha / self.config.rank * (tensors[module + B] @ down)
        return state
