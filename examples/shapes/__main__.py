"""`python -m examples.shapes`: train on the world of shapes, or go on where the last run stopped; then measure."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.shapes import autoencoder, report, training
from examples.shapes.measure import Artist, Protocol, measure


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.shapes", description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("runs/shapes"), help="training state, saved every minute")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where figures, page and pictures go")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--steps", type=int, default=training.STEPS, help="training steps of the network")
    parser.add_argument("--codec-steps", type=int, default=autoencoder.STEPS, help="training steps of the picture codec")
    parser.add_argument("--samples", type=int, default=Protocol.unconditional, help="samples of each unconditional task")
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    codec, codec_history = autoencoder.fit(arguments.state, training.device(), arguments.codec_steps)
    model, history = training.fit(arguments.state, codec, arguments.steps)
    conditional = max(1, min(Protocol.conditional, arguments.samples // 15))
    artist = Artist(model, codec, Protocol(unconditional=arguments.samples, conditional=conditional))
    values = report.figures(measure(artist), codec_history, history, artist)
    report.write(arguments.out, values, history, artist)
    print(" ".join(f"{name}={value}" for name, value in values.items() if isinstance(value, float | int)))


if __name__ == "__main__":
    main()
