"""One store with trainings of a small model."""

from pathlib import Path

import pytest

from tests.stages.train.trainings import Trainings


@pytest.fixture
def training(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    found = Trainings(tmp_path)
    monkeypatch.setattr("training.launch.train", found.train)
    return found
