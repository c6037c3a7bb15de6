"""What the watermark's benchmark found, and its page."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.watermark_page import CHANGES, NAMES, page

RESULT = Path("docs/results/watermark.json")
FOUND = json.loads(RESULT.read_text())


def test_the_page_shows_every_family_with_every_change_and_the_clean_pictures():
    text = page(FOUND)
    assert RESULT.with_suffix(".md").read_text(encoding="utf-8") == text
    for name in NAMES:
        assert FOUND["details"][name]["survived"].keys() == CHANGES.keys() and NAMES[name] in text
    families = FOUND["details"]["clean"]["families"]
    assert sum(families.values()) == FOUND["details"]["clean"]["pictures"] == 1000
    assert all(f"{count:,} {NAMES[name]}" in text for name, count in families.items())


def test_the_mark_that_is_on_by_default_outlives_what_pictures_go_through_and_is_in_no_clean_one():
    for family in ("scenes", "drawings", "photographs"):
        survived = FOUND["details"][family]["survived"]
        assert min(survived[name] for name in ("none", "jpeg_75", "resize_50", "crop_90")) >= 0.9, family
    assert FOUND["details"]["clean"]["found"] == 0
    assert FOUND["details"]["plain"]["largest"] == 1
