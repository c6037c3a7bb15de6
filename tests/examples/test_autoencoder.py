"""How the embedded autoencoder is trained: what is shipped is diffusers' own network, and levels that join change little."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.functional import avg_pool2d

from examples.encoders import autoencoder
from examples.encoders.filters import FilterMuon


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = autoencoder.build()
    autoencoder.solve_last_layer(model, pictures(64, 8), 2)
    return model


def pictures(px: int, count: int = 2) -> torch.Tensor:
    rng = random.Random(4)
    return autoencoder.to_tensor([autoencoder.example(rng, px) for _ in range(count)])


@torch.no_grad()
def test_with_all_levels_it_computes_what_diffusers_does(model: torch.nn.Module) -> None:
    x = pictures(128)
    mean = autoencoder.encode(model, x, 0)
    assert torch.equal(mean, model.encode(x).latent_dist.mean)
    decoded = model.decoder.conv_out(autoencoder.last_features(model, mean, 0))
    assert torch.equal(decoded, model.decode(mean).sample)


@torch.no_grad()
def test_levels_that_join_give_the_picture_that_the_inner_ones_gave(model: torch.nn.Module) -> None:
    def drawn(without: int) -> torch.Tensor:
        z = autoencoder.encode(model, pictures(256 >> without), without)
        return avg_pool2d(model.decoder.conv_out(autoencoder.last_features(model, z, without)), 4 >> without)

    inner = drawn(2)
    for without in (1, 0):
        # Of the difference between pictures, which a network of fresh random filters would share nothing of.
        assert (drawn(without) - inner).square().mean() < 0.02 * inner.var()


def test_levels_join_one_after_the_other() -> None:
    assert [autoencoder.left_out(step, 100) for step in (0, 74, 75, 89, 90, 99)] == [2, 2, 1, 1, 0, 0]


def test_the_learning_rate_is_the_spectral_norm_of_an_update_of_filters() -> None:
    torch.manual_seed(0)
    filters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((8, 8, 3, 3), (128, 96, 3, 3), (16, 8, 1, 1))]
    for each in filters:
        each.grad = torch.randn_like(each)
    left = torch.nn.Parameter(torch.ones(4, 4, 1, 1))  # of a level that has not joined
    FilterMuon([*filters, left], lr=0.01).step()
    for each in filters:
        assert 0.006 < torch.linalg.matrix_norm(each.detach().flatten(1), 2) < 0.013
    assert torch.equal(left, torch.ones_like(left))
