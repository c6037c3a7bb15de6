"""What counts as a secret among settings that others will read, and that a recipe with one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.secret_words import secrets_in
from stages.runner.recipe import RecipeError
from tests.pipelines.servers.test_pools import recipe

# Of the form of a key, and nobody's.
KEY = "AKIA" + "ABCDEFGH" * 2
SECRETS: list[tuple[Any, str]] = [
    ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "env.AWS_SECRET_ACCESS_KEY"),
    ({"env": {"PREFECT_API_AUTH_STRING": "me:x"}}, "env.PREFECT_API_AUTH_STRING"),
    ({"env": {"HF_TOKEN": "x"}}, "env.HF_TOKEN"),
    ({"env": {"WHO": KEY}}, "env.WHO"),
    ({"env": {"LIST": "https://me:x@host/list"}}, "env.LIST"),
    ({"env": {"LIST": "https://host/list?a=1&X-Amz-Signature=x"}}, "env.LIST"),
    ({"command": ["serve", "--password=x"]}, "command.1"),
    ({"env": [{"name": "DB_PASSWORD", "value": "x"}]}, "env.0.DB_PASSWORD"),
]
NONE: list[Any] = [
    {"env": {"HF_TOKEN": "{{ prefect.blocks.secret.hf }}", "RAY_AUTH_TOKEN": "{{ $RAY_AUTH_TOKEN }}"}},
    {"env": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/run/token", "TOKENIZERS_PARALLELISM": "false"}},
    {"env": {"LIST": "https://host/list?page=2", "STORE": "abfs://container@account/runs"}},
    {"image": "registry/unidiffuser:1@sha256:" + "a" * 64, "image_pull_secrets": ["registry"]},
    {"volumes": [{"name": "tls", "secret": {"secretName": "tls"}}]},
    {"env": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "ray", "key": "token"}}}]},
]


@pytest.mark.parametrize(("settings", "place"), SECRETS)
def test_what_looks_like_a_secret_is_found_by_its_name_or_its_value(settings: Any, place: str) -> None:
    assert list(secrets_in(settings)) == [place]


@pytest.mark.parametrize("settings", NONE)
def test_what_says_where_a_secret_lies_is_none(settings: Any) -> None:
    assert list(secrets_in(settings)) == []


def test_a_recipe_with_a_secret_among_its_pools_variables_is_refused_in_a_line_that_does_not_show_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^deploy\.pool\.variables: env\.HF_TOKEN looks like a secret, .* block ") as refusal:
        recipe(tmp_path, "deploy.pool.variables={env: {HF_TOKEN: pl4nted}}")
    assert "pl4nted" not in str(refusal.value) and "\n" not in str(refusal.value)
