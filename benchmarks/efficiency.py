"""The efficiency table, as the paper's Table 4: seconds and memory of ten samples, of what `benchmarks.sampling` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# arXiv 2303.06555, Table 4: ten samples in 25 steps on one A100-80GB; seconds and GB.
PAPER = {
    "UniDiffuser": (19.77, 48.30),
    "Versatile Diffusion": (23.89, 76.53),
    "Stable Diffusion": (25.43, 67.83),
}
NAMES = {
    "ours": "this project",
    "diffusers": "diffusers' UniDiffuserPipeline",
    "ours compiled": "this project, compiled",
    "diffusers compiled": "diffusers' UniDiffuserPipeline, compiled",
}
TASKS = {"t2i": "text to image", "i2t": "image to text"}


def page(record: Mapping[str, Any]) -> str:
    """The page of a result that `benchmarks.sampling` wrote, Markdown."""
    details, sizes = record["details"], record["details"]["sizes"]
    lines = ["| task | side | inference time (s) | memory (GB) |", "|---|---|---|---|"]
    for task, found in details["tasks"].items():
        for side, name in NAMES.items():
            if side in found["median"]:
                memory = found.get("memory_mib", {}).get(side)
                shown = "not measured" if memory is None else f"{memory * 2**20 / 1e9:.2f}"
                lines.append(f"| {TASKS[task]} | {name} | {found['median'][side]:.2f} | {shown} |")
    paper = [f"| {name} | {seconds:.2f} | {memory:.2f} |" for name, (seconds, memory) in PAPER.items()]
    return f"""# Efficiency

Seconds and memory of {details["count"]} samples in {details["steps"]} steps with guidance {details["guidance"]:g}, encoding and
decoding included. Both sides have the same random weights, in fp32: a U-ViT of width {sizes["width"]} and depth
{sizes["depth"]}, pictures of {sizes["pixels"]} pixels, Stable Diffusion's autoencoder at {sizes["autoencoder"]} channels, and a
caption decoder of width {sizes["decoder"]}. Seconds are medians. Memory is the peak of a process of its own: resident on a CPU,
allocated on a GPU.

{chr(10).join(lines)}

Machine: {record["machine"]}. Measured {record["date"]} by `{record["command"]}`; all figures are in `sampling.json`.

## The paper's own figures

From Table 4 of [arXiv 2303.06555](https://arxiv.org/abs/2303.06555): ten samples in 25 steps on one A100-80GB, 512 pixels.

| model | inference time (s) | memory (GB) |
|---|---|---|
{chr(10).join(paper)}

The two tables compare where device and sizes are the same. On such a device, this measures the paper's sizes:
`python -m benchmarks.sampling --width 1536 --depth 30 --pixels 512 --json docs/results/sampling.json`.
"""
