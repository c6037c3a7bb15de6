"""The world of shapes: pictures and captions that read back, a joint distribution as declared, scores that can fail."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from examples.shapes.autoencoder import LATENT_DEVIATION, Autoencoder
from examples.shapes.codec import LENGTH, WORD_SCALE, WORDS, decode_captions, encode_captions
from examples.shapes.measure import accuracy, distribution, floor, total_variation, variations
from examples.shapes.pictures import PALETTE, PAPER, SIDE, read_picture, render
from examples.shapes.pretraining import crowded_pictures, fit
from examples.shapes.world import (
    COLOURS,
    PHRASINGS,
    SCENES,
    VALUES,
    Scene,
    all_captions,
    caption,
    draw,
    draw_captions,
    joint,
    read_caption,
    scene_at,
)

RED_SQUARES = Scene("red", "square", "left", 2)


def blank() -> np.ndarray:
    return np.broadcast_to(PAPER.astype(np.uint8), (SIDE, SIDE, 3)).copy()


def test_every_scene_reads_back_from_jittered_pictures() -> None:
    scenes = [scene for scene in SCENES for _ in range(4)]
    rng = np.random.default_rng(11)
    pictures = np.stack([render(scene, rng) for scene in scenes])
    assert [read_picture(picture) for picture in pictures] == scenes
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 50  # the jitter moves things


def test_the_forms_stand_where_the_scene_says_in_its_colour() -> None:
    for scene in SCENES:
        picture = render(scene, np.random.default_rng(3)).astype(float)
        near = np.linalg.norm(picture - PALETTE[scene.colour], axis=2) < 30
        rows, columns = np.nonzero(near)
        x, y = columns.mean() / SIDE, rows.mean() / SIDE
        assert (x < 0.35, x > 0.65, y < 0.35, y > 0.65) == tuple(scene.place == p for p in ("left", "right", "top", "bottom"))
        assert 80 * scene.count < near.sum() < 280 * scene.count


def test_a_picture_that_shows_no_scene_is_unreadable() -> None:
    def with_form(colour: str, form: str, place: str) -> np.ndarray:
        return render(Scene(colour, form, place, 1), np.random.default_rng(0)).astype(int)

    one = with_form("red", "square", "left")
    two_colours = np.minimum(one, with_form("blue", "square", "right"))
    two_forms = np.minimum(one, with_form("red", "circle", "right"))
    three = np.minimum(np.minimum(one, with_form("red", "square", "right")), with_form("red", "square", "top"))
    foreign = blank()
    foreign[24:40, 24:40] = (20, 20, 20)
    smear = blank()
    smear[30:34, 4:60] = PALETTE["red"]
    between = np.roll(with_form("red", "square", "left"), 18, 1)
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3))
    for picture in (blank(), two_colours, two_forms, three, foreign, smear, between, noise):
        assert read_picture(picture.astype(np.uint8)) is None
    assert read_picture(one.astype(np.uint8)) == Scene("red", "square", "left", 1)


def test_every_caption_reads_back_and_nothing_else_does() -> None:
    captions = list(all_captions())
    assert len({text for text, _ in captions}) == len(SCENES) * len(PHRASINGS) == 288
    assert all(read_caption(text) == scene for text, scene in captions)
    assert decode_captions(encode_captions([text for text, _ in captions])) == [text for text, _ in captions]
    for wrong in (
        "two red square on the left",
        "one red squares on the left",
        "two red squares at the left",
        "two red squares",
        "",
    ):
        assert read_caption(wrong) is None


def test_the_latents_of_captions_are_centred_on_the_world() -> None:
    rng = np.random.default_rng(0)
    latents = encode_captions(draw_captions(draw(rng, 20_000), rng))
    assert latents.mean(0).abs().max() < 5 * WORD_SCALE * 0.5 / 20_000**0.5


def test_padding_inside_a_caption_makes_it_unreadable() -> None:
    latents = encode_captions(["two red squares on the left"])
    assert latents.shape == (1, LENGTH, len(WORDS))
    assert read_caption(decode_captions(latents)[0]) == RED_SQUARES
    latents[0, 1, WORDS.index("red")] -= WORD_SCALE
    latents[0, 1, WORDS.index("")] += WORD_SCALE
    assert decode_captions(latents) == ["two  squares on the left"]
    assert read_caption(decode_captions(latents)[0]) is None


def test_the_joint_distribution_is_what_is_drawn_and_its_attributes_depend_on_each_other() -> None:
    table = joint()
    assert table.shape == tuple(len(values) for values in VALUES.values())
    assert table.sum() == pytest.approx(1) and table.min() > 0
    counts = Counter(draw(np.random.default_rng(5), 20_000))
    drawn = np.array([counts[scene] for scene in SCENES]) / 20_000
    deviation = np.sqrt(table.ravel() * (1 - table.ravel()) / 20_000)
    assert np.all(np.abs(drawn - table.ravel()) < 5 * deviation)
    assert table[0].sum() == pytest.approx(0.40) and table[COLOURS.index("yellow"), 2].sum() == pytest.approx(0.30 * 0.75)
    colour, form = table.sum((1, 2, 3)), table.sum((0, 2, 3))
    assert np.abs(table.sum((2, 3)) - np.outer(colour, form)).sum() / 2 > 0.2


def test_accuracy_counts_attributes_and_gives_the_unreadable_nothing() -> None:
    wanted = [RED_SQUARES] * 4
    got = [RED_SQUARES, RED_SQUARES._replace(colour="blue"), RED_SQUARES._replace(place="top", count=1), None]
    shares = accuracy(wanted, got)
    assert [shares[name] for name in VALUES] == [0.5, 0.75, 0.5, 0.5]
    assert (shares["attributes"], shares["all"], shares["unreadable"]) == (0.5625, 0.25, 0.25)
    assert accuracy([None], [None])["all"] == 0  # two unreadables do not agree


def test_total_variation_of_hand_made_counts() -> None:
    truth = np.array([0.5, 0.3, 0.2])
    assert total_variation(np.array([5, 3, 2]), 0, truth) == pytest.approx(0)
    assert total_variation(np.array([10, 0, 0]), 0, truth) == pytest.approx(0.5)
    assert total_variation(np.array([5, 3, 2]), 10, truth) == pytest.approx(0.5)
    assert total_variation(np.array([0, 0, 0]), 7, truth) == pytest.approx(1)


def test_a_sampler_of_the_truth_scores_the_floor_and_wrong_ones_do_not() -> None:
    rng = np.random.default_rng(6)
    exact = distribution(draw(rng, 4000))
    assert exact["unreadable"] == 0
    for name in ("largest", "pairs", "joint"):
        assert exact[name] == pytest.approx(exact["floor"][name], rel=0.5)

    table = joint()
    marginals = [table.sum(tuple(other for other in range(4) if other != axis)) for axis in range(4)]
    columns = [rng.choice(len(p), 4000, p=p) for p in marginals]
    independent = [
        Scene(*(values[i] for values, i in zip(VALUES.values(), row, strict=True))) for row in zip(*columns, strict=True)
    ]
    found = distribution(independent)
    assert found["largest"] < 0.05 < 0.2 < found["pairs"] < found["joint"]

    blind = accuracy(draw(rng, 4000), draw(rng, 4000))  # ignores what it is given: chance, the sum of squared probabilities
    assert [blind[name] for name in VALUES] == pytest.approx([float((p**2).sum()) for p in marginals], abs=0.03)
    assert distribution([RED_SQUARES] * 50 + [None] * 50)["largest"] > 0.7
    assert floor(100)["joint"] > floor(10_000)["joint"] > 0
    assert variations(table * 1000, 0)["joint"] == pytest.approx(0, abs=1e-9)


def test_the_codec_learns_and_its_latents_are_centred_at_their_scale() -> None:
    def error(codec: Autoencoder) -> float:
        pictures = crowded_pictures(999, 16)
        return float(np.square(codec.decode(codec.encode(pictures)).astype(float) - pictures).mean())

    told: list[int] = []
    early = fit(torch.device("cpu"), 1)
    codec = fit(torch.device("cpu"), 40, lambda step, loss: told.append(step))
    assert error(codec) < 0.5 * error(early) and told == list(range(1, 41))
    rng = np.random.default_rng(1)
    latents = codec.encode(np.stack([render(scene, rng) for scene in draw(rng, 500)]))
    assert latents.std().item() == pytest.approx(LATENT_DEVIATION, rel=0.05)
    assert latents.mean(0).square().mean().sqrt() < 0.15 * LATENT_DEVIATION


def test_captions_are_drawn_in_all_phrasings() -> None:
    drawn = draw_captions([RED_SQUARES] * 60, np.random.default_rng(0))
    assert set(drawn) == {caption(RED_SQUARES, point) for point in (0.1, 0.5, 0.9)}


def test_every_scene_has_its_probability_as_a_stretch_of_the_numbers() -> None:
    points = (np.arange(100_000) + 0.5) / 100_000
    counts = Counter(scene_at(point) for point in points)
    assert [counts[scene] / 100_000 for scene in SCENES] == pytest.approx(joint().ravel().tolist(), abs=2e-5)
