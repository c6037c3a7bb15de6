"""What is published: the figures, and a page with tables, the curve of the losses and samples."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from examples.shapes.codec import LENGTH
from examples.shapes.measure import Artist
from examples.shapes.world import SCENES, VALUES

COMMAND = "unidiffuser run configs/shapes.yaml"

BARS = (
    ("t2i_accuracy", "text to image, attributes right", 0.99, True),
    ("i2t_accuracy", "image to text, attributes right", 0.99, True),
    ("joint_consistency", "joint samples whose picture and caption agree in all four attributes", 0.99, True),
    ("image_marginal_tv", f"image only, total variation over all {len(SCENES)} scenes", 0.05, False),
    ("text_marginal_tv", f"text only, total variation over all {len(SCENES)} scenes", 0.05, False),
    ("minutes", "minutes of training", 28, False),
)


def figures(
    artist: Artist, found: dict[str, Any], made: dict[str, Any], training: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of shapes.json: seven figures, and below `details` what they are made of.

    Args:
        found: of `measure.measure`.
        made: the summary of the dataset of pairs; the minutes count.
        training: the configuration of the network's training.
        rows: of the history of that.
    """
    protocol, network, schedule = artist.protocol, artist.model.config, artist.schedule
    minutes, core_minutes = (sum(row[name] for row in rows) / 60 for name in ("seconds", "core_seconds"))
    pairs = made["latents"]["minutes"]
    return {
        "t2i_accuracy": round(found["t2i"]["attributes"], 4),
        "i2t_accuracy": round(found["i2t"]["attributes"], 4),
        "joint_consistency": round(found["joint"]["consistency"]["all"], 4),
        "image_marginal_tv": round(found["i"]["joint"], 4),
        "text_marginal_tv": round(found["t"]["joint"], 4),
        "minutes": round(made["codec"]["minutes"] + pairs + minutes, 1),
        "core_minutes": round(made["codec"]["core_minutes"] + pairs + core_minutes, 1),
        "parameters": parameters(artist.model),
        "details": rounded(found),
        "samples": {"conditional": protocol.conditional, "unconditional": protocol.unconditional},
        "sampling": {
            "sampler": protocol.sampler,
            "steps": protocol.steps,
            "guidance_conditional": protocol.guidance,
            "guidance_unconditional": 0.0,
        },
        "training": {
            "min_snr_gamma": training["objective"]["min_snr_gamma"],
            "last_signal": round(schedule.alpha_bar[-1].sqrt().item(), 4),
            "steps": rows[-1]["step"],
            "batch": training["global_batch"],
            "minutes": round(minutes, 1),
        },
        "network": {"width": network.width, "depth": network.depth, "heads": network.heads},
        "codec": {name: made["codec"][name] for name in ("parameters", "steps", "minutes")},
        "pairs": made["latents"],
        "command": COMMAND,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": next(artist.model.parameters()).device.type,
        "torch": torch.__version__,
    }


def parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def rounded(value: Any) -> Any:
    """All numbers in nested dicts with four digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def page(values: dict[str, Any]) -> str:
    """The Markdown page that goes with the figures."""
    details = values["details"]
    samples, sampling, training, codec = (values[name] for name in ("samples", "sampling", "training", "codec"))
    drawn = f"{samples['unconditional']:,} samples, no guidance"
    obeyed = f"{samples['conditional']:,} samples each way, guidance {sampling['guidance_conditional']}"

    def row(name: str, shares: dict[str, float]) -> str:
        cells = [shares[each] for each in (*VALUES, "attributes", "all", "unreadable")]
        return f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |"

    def bar_row(name: str, meaning: str, bar: float, at_least: bool) -> str:
        met = values[name] >= bar if at_least else values[name] <= bar
        return f"| {meaning} | {values[name]} | at {'least' if at_least else 'most'} {bar} | {'yes' if met else '**no**'} |"

    def tv_row(name: str, found: dict[str, Any]) -> str:
        cells = [f"{found[each]:.3f}" for each in (*VALUES, "largest")]
        cells += [f"{found[each]:.3f} ({found['floor'][each]:.3f})" for each in ("pairs", "joint")]
        return f"| {name} | " + " | ".join(cells) + f" | {found['unreadable']:.3f} |"

    return f"""# Shapes: one network, five distributions

A world whose every distribution is known: pictures of one or two coloured forms, and captions of them. Colour, form, place
and count ({len(SCENES)} scenes) follow a chosen joint distribution, skewed, in which they depend on each other. Exact parsers
read pictures and captions back; what they cannot read counts as wrong, and is a category of its own that the truth does not have.

![A row of samples for each of the five tasks](shapes-samples.png)

*Captions are green where a parser finds that picture and caption agree, red where not.*

One U-ViT of {values["parameters"]:,} parameters learns all five distributions from scratch: {training["steps"]:,} steps of
{training["batch"]} pairs, {training["minutes"]} minutes, by the stages that train on anything else: the recipe is
`configs/shapes.yaml`. Its objective has min-SNR weights (gamma {training["min_snr_gamma"]}). The noise schedule leaves
{training["last_signal"]:.1%} of the data at its end; scenes and timesteps come from one Sobol sequence, so that no stretch of
steps has more than its share of any; Muon moves the matrices of the blocks, AdamW the rest; the learning rate falls along a
cosine.

Before it, and frozen after, a small convolutional autoencoder is trained as picture codec ({codec["parameters"]:,} parameters,
{codec["minutes"]} minutes), on crowds of forms that tell nothing of the world's distribution: 64 x 64 pixels become 16 image
tokens. The caption codec, a scaled unit vector for each of {LENGTH} words, needs no training. Making the pairs takes
{values["pairs"]["minutes"]} minutes of one core. Together {values["minutes"]} minutes by the clock (cores: {values["cores"]},
threads: {values["threads"]}) and {values["core_minutes"]} minutes of processor time ({values["device"]}, torch
{values["torch"]}).

| figure | value | bar | met |
|---|---|---|---|
{chr(10).join(bar_row(*bar) for bar in BARS)}

Accuracy ({obeyed}; joint: {drawn}):

| | {" | ".join(VALUES)} | mean | all four | unreadable |
|---|---|---|---|---|---|---|---|
{row("the codec alone: a picture against itself", details["codec"])}
{row("text to image", details["t2i"])}
{row("image to text", details["i2t"])}
{row("joint: picture against caption", details["joint"]["consistency"])}

Total variation from the truth ({drawn}; in brackets what as many samples of the truth itself give on average,
which no model beats):

| | {" | ".join(VALUES)} | largest | worst pair | all four together | unreadable |
|---|---|---|---|---|---|---|---|---|
{tv_row("image only", details["i"])}
{tv_row("text only", details["t"])}
{tv_row("joint: pictures", details["joint"]["image"])}
{tv_row("joint: captions", details["joint"]["text"])}

All samples are drawn in {sampling["steps"]} steps of `{sampling["sampler"]}`, with the moving average of the weights.

![Losses against minutes of training](shapes-curve.png)

`make shapes` runs `{COMMAND}`, which goes on where it was stopped, and keeps its report here; the figures are in `shapes.json`.
What single choices of the recipe give is [a table of its own](shapes-changes.md).
"""
