"""The numerics of a training do not move unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.curve import TOLERANCES, curve, moved


@pytest.mark.parametrize("kind", list(TOLERANCES))
def test_losses_are_those_of_the_stored_curve(alone: None, kind: str, tmp_path: Path) -> None:
    losses = curve(kind, tmp_path)
    assert losses[-1] < 0.9 * losses[0]
    step, apart = moved(kind, losses)
    assert apart <= TOLERANCES[kind], f"step {step}: if the numerics were meant to change, run `make loss-curve`"
