"""Whole evaluations by name; a field beside `preset` overrides one of it."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2303.06555, section 6: 30,000 captions of MS-COCO's validation set, 50 steps of DPM-Solver, guidance 3. FID is over
    # Inception; the CLIP is the one that CMMD was published with.
    "paper": {
        "count": 30_000,
        "steps": 50,
        "sampler": "dpm++2m",
        "guidance": 3.0,
        "judge": "ViT-L-14-336/openai",
        "measures": [
            {"kind": "fid", "features": "inception"},
            {"kind": "kid", "features": "inception"},
            {"kind": "cmmd"},
            {"kind": "precision-recall", "features": "inception", "count": 10_000},
            {"kind": "clip-score"},
            {"kind": "captions", "count": 5_000},
        ],
    },
    # An hour or so on one GPU. No network but those that the model has.
    "small": {
        "count": 2_048,
        "steps": 25,
        "measures": [
            {"kind": "fid"},
            {"kind": "kid", "subset": 500},
            {"kind": "cmmd"},
            {"kind": "precision-recall"},
            {"kind": "clip-score"},
            {"kind": "captions", "count": 500},
        ],
    },
    # A minute or so on the cores of a laptop, for models of the demo's size.
    "laptop": {
        "count": 200,
        "steps": 12,
        # Of so few steps it makes the better pictures.
        "sampler": "dpm++2m",
        "beams": 1,
        "measures": [
            {"kind": "fid"},
            {"kind": "kid", "subset": 100, "subsets": 10},
            {"kind": "cmmd"},
            {"kind": "precision-recall"},
            {"kind": "clip-score"},
            {"kind": "captions"},
            {"kind": "preference"},
        ],
    },
}
