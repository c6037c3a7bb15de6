"""What a person looks at: the losses of a training run, and a sheet of samples of all five tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.figure import Figure

from examples.shapes.measure import Artist
from examples.shapes.pictures import read_picture, render
from examples.shapes.world import draw, draw_captions, read_caption

INK, PALE, GOOD, BAD = "#22272e", "#8b949e", "#1a7f37", "#cf222e"
COLUMNS = 7
SIDE_INCHES, GAP, TITLE, CAPTION = 1.6, 0.14, 0.36, 0.46


def curve(file: Path | IO[bytes], rows: list[dict[str, Any]]) -> None:
    """Losses of the network's training against its minutes, from rows with `seconds`, `loss_latent` and `loss_text`."""
    figure = Figure(figsize=(9, 3), dpi=110, facecolor="white")
    axes = figure.subplots()
    minutes = np.cumsum([row["seconds"] for row in rows]) / 60
    for name, color in (("latent", "C0"), ("text", "C1")):
        axes.plot(minutes, [row[f"loss_{name}"] for row in rows], color=color, linewidth=1, label=name)
    axes.set(yscale="log", ylabel="squared error of the noise", xlabel="minutes of training")
    axes.grid(color=PALE, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Software": None})


def sheet(path: Path, artist: Artist) -> None:
    """A row of samples for each of the five tasks. Captions that were drawn, or obeyed, are green where the picture agrees."""
    rng = np.random.default_rng(artist.protocol.seed)
    scenes = draw(rng, 2 * COLUMNS)
    prompts = draw_captions(scenes[:COLUMNS], rng)
    real = np.stack([render(scene, rng) for scene in scenes[COLUMNS:]])
    # Seeds of their own: from the same noise, the pictures of the joint task and of the image task would look alike.
    alone = Artist(artist.model, artist.codec, replace(artist.protocol, seed=artist.protocol.seed + COLUMNS))
    both, said = artist.imagine(COLUMNS)
    rows: list[tuple[str, np.ndarray | None, list[str] | None]] = [
        ("Text to image", artist.paint(prompts), prompts),
        ("Image to text", real, artist.describe(real)),
        ("Joint: image and text together", both, said),
        ("Image only", alone.pictures(COLUMNS), None),
        ("Text only", None, alone.captions(COLUMNS)),
    ]
    heights = [TITLE + (SIDE_INCHES if p is not None else 0) + (CAPTION if c is not None else GAP) for _, p, c in rows]
    width, height = COLUMNS * (SIDE_INCHES + GAP) + GAP, sum(heights)
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    top = height
    for (title, pictures, captions), used in zip(rows, heights, strict=True):
        figure.text(GAP / width, (top - 0.6 * TITLE) / height, title, fontsize=11, fontweight="bold", color=INK, va="center")
        below = top - TITLE - (SIDE_INCHES if pictures is not None else 0)
        for column in range(COLUMNS):
            left = GAP + column * (SIDE_INCHES + GAP)
            if pictures is not None:
                axes = figure.add_axes((left / width, below / height, SIDE_INCHES / width, SIDE_INCHES / height))
                axes.imshow(pictures[column], interpolation="bicubic")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_color("#d0d7de")
            if captions is not None:
                scene = read_caption(captions[column])
                agrees = scene is not None and (pictures is None or scene == read_picture(pictures[column]))
                middle = (left + SIDE_INCHES / 2) / width
                figure.text(middle, (below - 0.06) / height, wrapped(captions[column]), ha="center", va="top", fontsize=8.5,
                            color=GOOD if agrees else BAD)  # fmt: skip
        top -= used
    figure.savefig(path, metadata={"Software": None})


def wrapped(caption: str) -> str:
    """A caption on two lines."""
    words = caption.split()
    return " ".join(words[: (len(words) + 1) // 2]) + "\n" + " ".join(words[(len(words) + 1) // 2 :])
