"""One store with trainings of a small model, and the smallest world of shapes."""

from pathlib import Path

import pytest

from tests.stages.little_world import checkpoint, made, small
from tests.stages.train.trainings import Trainings

__all__ = ["checkpoint", "made", "small"]


@pytest.fixture
def training(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    found = Trainings(tmp_path)
    monkeypatch.setattr("training.launch.train", found.train)
    return found
