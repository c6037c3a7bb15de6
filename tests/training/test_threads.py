"""Threads beside the steps: none brings a team of its own, which would put the steps' own team to sleep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.synthetic import config, write_shards
from training.loader import Loader


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_batches_are_read_and_made_by_one_thread_each_and_the_steps_keep_theirs(
    two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[int]] = {"_batch": set(), "_read": set()}

    def noted(name: str, method: Any) -> Any:
        def noting(*given: Any) -> Any:
            seen[name].add(torch.get_num_threads())
            return method(*given)

        return noting

    for name in seen:
        monkeypatch.setattr(Loader, name, noted(name, getattr(Loader, name)))
    list(Loader(config(), write_shards(tmp_path)).batches(0, 4))
    assert seen == {"_batch": {1}, "_read": {1}}
    assert torch.get_num_threads() == 2
