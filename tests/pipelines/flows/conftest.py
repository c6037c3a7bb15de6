"""A recipe of one node and a store, for what needs no server."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.store import Store
from stages.runner.recipe import Recipe, load_recipe
from tests.pipelines.conftest import write_metadata


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_metadata(tmp_path / "metadata" / "part-0.parquet")
    path = tmp_path / "tiny.yaml"
    path.write_text("name: tiny\nsubsets:\n  good: {select: {metadata: [metadata/*.parquet], min_width: 256, min_height: 256}}\n")
    return load_recipe(path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))
