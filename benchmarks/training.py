"""The training step against plain matrix products of the same shapes: how much of the machine's arithmetic the step reaches.

The step is the training loop's: joint objective, backward pass and AdamW in a DeepSpeed engine, compiled. Its peer runs the
matrix products that the step contains, and nothing else. Width and tokens are the paper's at 256 px; depth and batch fit a
laptop, and hardly move the ratio (every block is alike; a larger batch makes the optimizer's share smaller). Where the step
goes by oneDNN, since torch's own products are slow there (see ``unidiffuser.linear``), the products run by oneDNN too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.frame import Result, choose_device, interleaved, machine, peak_in_child, progress, timed
from benchmarks.matmuls import Product, recorded, replay
from training.config import ModelConfig, TrainConfig
from training.engine import compiled, initialise_engine, resolve_precision
from training.loop import uvit_config
from unidiffuser import linear
from unidiffuser.modalities import Modality, all_parts, paper_modalities
from unidiffuser.objective import JointObjective
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.uvit import UViT

aten = torch.ops.aten
# A CPU's attention, which torch's counter has left out before 2.15.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
}


class Step:
    """One training step on a fixed batch of random latents."""

    def __init__(self, config: TrainConfig, modalities: tuple[Modality, ...], device: torch.device) -> None:
        self.config, self.modalities, self.device = config, modalities, device
        torch.manual_seed(0)
        self.model = UViT(uvit_config(config, modalities)).to(device)
        self.objective = JointObjective(modalities, NoiseSchedule().to(device))
        self.batch = {part.name: torch.randn(config.global_batch, *part.shape, device=device) for part in all_parts(modalities)}
        self.timesteps, self.noise = self.objective.draw(self.batch)

    def start(self) -> Step:
        """Compile, and put DeepSpeed around the model."""
        if not dist.is_initialized():
            os.environ.setdefault("LOCAL_RANK", "0")  # asked for by DeepSpeed
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if self.config.compile and not compiled(self.model, self.config, self.device):
            raise SystemExit("no compiler found: install g++, or pass --eager")
        self.engine, _ = initialise_engine(self.model, self.config, 1, self.device)
        return self

    def loss(self, model: nn.Module) -> Tensor:
        return self.objective.loss(model, self.batch, self.timesteps, self.noise)[0]

    def run(self) -> None:
        """Forward, backward, AdamW."""
        self.engine.backward(self.loss(self.engine))
        self.engine.step()

    def products(self) -> list[Product]:
        """The matrix products of a step, found by running one eagerly without optimizer.

        Raises:
            RuntimeError: they are not what ``torch.utils.flop_counter`` counts.
        """
        with recorded() as recorder, FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            self.loss(self.model).backward()
        self.model.zero_grad(set_to_none=True)
        if sum(product.flop for product in recorder.found) != counter.get_total_flops():
            raise RuntimeError("the products found are not those that torch.utils.flop_counter counts")
        return recorder.found

    def phases(self) -> dict[str, float]:
        """Seconds of the three phases of a step."""
        found: list[Tensor] = []
        return {
            "forward": timed(lambda: found.append(self.loss(self.engine)), self.device),
            "backward": timed(lambda: self.engine.backward(found[0]), self.device),
            "optimizer": timed(lambda: self.engine.step(), self.device),
        }


def warm_step(config: TrainConfig, modalities: tuple[Modality, ...], device: torch.device) -> Callable[[], None]:
    """A step that has run before, for the measurement of memory."""
    step = Step(config, modalities, device).start()
    step.run()
    return step.run


def main(
    width: Annotated[int, typer.Option(min=64, help="Width of the U-ViT, a multiple of 64; the paper's is 1536.")] = 1536,
    depth: Annotated[int, typer.Option(min=2, help="In and out blocks, even; the paper's is 30.")] = 2,
    pixels: Annotated[int, typer.Option(min=16, help="Side of the pictures, a multiple of 16.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of step and products.")] = 5,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile.")] = False,
    memory: Annotated[
        bool, typer.Option(help="Measure memory with and without checkpointing, in processes of their own.")
    ] = True,
    memory_batch: Annotated[
        int, typer.Option(min=1, help="Samples while memory is measured; of few the optimizer is the peak, not the activations.")
    ] = 64,
    threads: Annotated[int, typer.Option(help="Threads on a CPU; 0 leaves torch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="auto is CUDA where it is found.")] = "auto",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Compare the compiled training step with plain matrix products of the same shapes."""
    if threads:
        torch.set_num_threads(threads)
    place = choose_device(device)
    words = machine(place)
    modalities = paper_modalities((4, pixels // 8, pixels // 8))

    def config(checkpointing: bool, samples: int = batch) -> TrainConfig:
        model = ModelConfig(width=width, depth=depth, heads=width // 64, activation_checkpointing=checkpointing)
        return TrainConfig(steps=1, global_batch=samples, model=model, compile=not eager)

    step = Step(config(False), modalities, place)
    products = step.products()
    flop = sum(product.flop for product in products)
    progress(f"{sum(p.numel() for p in step.model.parameters()):,} parameters, {flop / 1e12:.2f} TFLOP a step")
    precision = resolve_precision("auto", place)
    plain = replay(products, torch.bfloat16 if precision == "bf16" else torch.float32, place)
    first = timed(step.start().run, place)
    plain()
    runs = {"step": step.run, "products": plain}
    if linear.ONEDNN and place.type == "cpu" and precision == "fp32":
        runs["onednn"] = replay(products, torch.float32, place, onednn=True)
    seconds = interleaved(runs, rounds, place)
    typical = {name: median(values) for name, values in seconds.items()}
    phases = step.phases()
    figures = {
        "compiled": "no" if eager else "yes",
        "gflops": round(flop / typical["step"] / 1e9),
        "products_gflops": round(flop / typical["products"] / 1e9),
        "first_step_s": round(first, 1),
    }
    if "onednn" in runs:
        figures["onednn_gflops"] = round(flop / typical["onednn"] / 1e9)
        figures["onednn_ratio"] = round(typical["onednn"] / typical["step"], 3)
    if memory:
        del step, plain, runs
        for name, checkpointing in (("memory_mib", False), ("checkpointed_mib", True)):
            figures[name] = round(peak_in_child(warm_step, config(checkpointing, memory_batch), modalities, place))
            progress(f"{name} {figures[name]}")
    details = {
        "sizes": {"width": width, "depth": depth, "pixels": pixels, "batch": batch, "precision": precision},
        "memory_batch": memory_batch if memory else None,
        "flop": flop,
        "products": len(products),
        "seconds": seconds,
        "phases": phases,
    }
    ratio = typical["products"] / typical["step"]
    Result("training", round(ratio, 3), "matmul", figures, words, details).finish(file)


if __name__ == "__main__":
    typer.run(main)
