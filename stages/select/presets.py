"""The paper's three subsets as thresholds; a field beside `preset` in a recipe overrides one, and null takes it away.

The resolved numbers, not the preset's name, are what a dataset's manifest holds and what its fingerprint counts.
"""

from __future__ import annotations

from typing import Any

# LAION's own thresholds: a picture is taken for unsafe from punsafe 0.5 and for watermarked from pwatermark 0.8 on; pairs of
# laion2B-en have a CLIP ViT-B/32 similarity of 0.28 or more. Bounds are inclusive and scores float32, so that the published
# "less than" is the next smaller float32.
_LAION = {"min_similarity": 0.28, "max_punsafe": 0.49999997, "max_pwatermark": 0.79999995}

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2303.06555, section 6.1: the first stage at 256 px. Smaller pictures would be enlarged.
    "laion2B-en-256": {**_LAION, "min_side": 256},
    # The second stage at 512 px; laion-high-resolution is the pairs of LAION-5B with 1024 pixels or more a side.
    "laion-high-resolution-512": {**_LAION, "min_side": 1024},
    # The third stage at 512 px: laion-aesthetics v2 5+, the pairs with a predicted score of 5 or more.
    "laion-aesthetics-512": {**_LAION, "min_side": 512, "min_aesthetic": 5.0},
}
