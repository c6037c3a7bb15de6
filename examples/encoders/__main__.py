"""`python -m examples.encoders [all|vae|gpt2|clip|judge|card]`: train the embedded encoders, or go on where a run stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from examples.encoders import autoencoder, captions, contrastive, judging, measure
from unidiffuser.references import EMBEDDED


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.encoders", description=__doc__)
    parser.add_argument("what", nargs="?", default="all", choices=("all", "vae", "gpt2", "clip", "judge", "card"))
    parser.add_argument("--state", type=Path, default=Path("runs/encoders"), help="training states, saved every minute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--steps", type=int, help="stop there instead (with the learning rate fallen); weights are written then")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    what, state, steps = arguments.what, arguments.state, arguments.steps
    if what in ("all", "gpt2"):
        captions.fit(state, EMBEDDED / "gpt2", steps or captions.STEPS)
    if what in ("all", "clip"):
        contrastive.fit(state, EMBEDDED / "clip", EMBEDDED / "gpt2", steps or contrastive.STEPS)
    if what in ("all", "vae"):
        autoencoder.fit(state, EMBEDDED / "vae", steps or autoencoder.STEPS)
    if what in ("all", "judge"):
        judging.fit(state, EMBEDDED / "judge", steps or judging.STEPS)
    measure.model_card(EMBEDDED / "MODEL_CARD.md")


if __name__ == "__main__":
    main()
