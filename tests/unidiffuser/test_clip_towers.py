"""CLIP towers and CLIP's tokenizer in transformers, against open_clip with the same random weights."""

from __future__ import annotations

import random

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from examples.little_web.compose import all_scenes, caption
from tests.unidiffuser.test_generation import noise_image
from unidiffuser.clip_towers import clip_tokenizer, image_tower, text_tower
from unidiffuser.encoders import ClipEncoder
from unidiffuser.tensors import WeightsError

STRANGE = [
    "",
    " ",
    "a",
    "A LION, at the TOP!!",
    "it's the dog's; they'll've said: \"don't\" (1984) 3.14 a1b2 50%",
    "two  spaces\tand\nlines",
    "ein großer roter Apfel — naïve café",
    "小さなパンダ 一只熊猫 작은 판다",
    "маленькая панда Ёлка Σίσυφο",
    "🐼🍎 emoji 👩‍🚀 and ½ ² №",
    "snake_case-and/slashes\\back #hash @at <tag>",
    "supercalifragilisticexpialidocious " * 20,
]


def public_clip(quick_gelu: bool = True, **text: object) -> ClipEncoder:
    """A CLIP as open_clip makes one of a public name, tokenizer included, but small and with random weights."""
    torch.manual_seed(0)
    settings = {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2, **text},
    }
    model = open_clip.model.CustomTextCLIP(**settings)
    model.visual.preprocess_cfg = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.3, 0.3)}
    return ClipEncoder(model, SimpleTokenizer(), "small/none", settings)


def test_the_tokenizer_is_open_clips_on_every_kind_of_text():
    texts = STRANGE + [caption(scene, random.Random(n)) for n, scene in enumerate(all_scenes()[::20])]
    theirs = clip_tokenizer()(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ours = public_clip().ids(texts)
    assert theirs.shape == ours.shape == (len(texts), 77)
    assert torch.equal(theirs, ours)
    # And open_clip's own, up to its first end of text: behind it, it has zeros.
    own = open_clip.tokenize(texts)
    assert torch.equal(own[own != 0], ours[own != 0])

    # What the docstring says is not alike.
    for text in ("curly “quotes”", "bread &amp; butter"):
        assert clip_tokenizer()(text).input_ids != [number for number in open_clip.tokenize([text])[0].tolist() if number]


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_towers_compute_the_same(quick_gelu):
    clip = public_clip(quick_gelu)
    texts = ["a small panda", "a large red apple on a blue background"]
    tokenizer = clip_tokenizer(clip.context_length)
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    image = noise_image(0, (32, 32))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    with torch.no_grad():
        hidden = text_tower(clip, tokenizer)(ids).last_hidden_state
        embedded = image_tower(clip)(clip._preprocess(pixels))
    torch.testing.assert_close(hidden, clip.tokens(texts), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embedded.image_embeds, clip.image([image]), atol=1e-5, rtol=1e-4)


def test_padding_changes_no_pooled_embedding():
    """The end of the text is found before what fills up behind it."""
    clip = public_clip()
    texts = ["a small panda", "a lion"]
    with torch.no_grad():
        pooled, _ = clip.model.text(open_clip.tokenize(texts))
    torch.testing.assert_close(clip.text(texts), pooled, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_causal_mask": True}, "without a causal mask"),
        ({"ls_init_value": 0.1}, "ls_1.gamma: a tensor that transformers' CLIP does not have"),
        ({"act_kwargs": {"approximate": "tanh"}}, "approximated GELU"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(settings, message):
    with pytest.raises(WeightsError, match=message):
        text_tower(public_clip(quick_gelu=False, **settings), clip_tokenizer())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timm_model_name": "vit_base_patch16_224"}, "image tower of timm"),
        ({"pool_type": "avg"}, "pool_type avg, transformers' CLIP takes the class token"),
        ({"final_ln_after_pool": True}, "takes the class token"),
        ({"image_size": (32, 40)}, "pictures of 40 x 32 pixels, transformers' CLIP takes squares"),
    ],
)
def test_an_image_tower_that_transformers_does_not_have_is_refused(settings, message):
    clip = public_clip()
    # timm itself is not needed to know its towers.
    told = {name: value for name, value in settings.items() if not name.startswith("timm")}
    model = open_clip.model.CustomTextCLIP(**clip.settings | {"vision_cfg": clip.settings["vision_cfg"] | told})
    model.visual.preprocess_cfg = {"size": told.get("image_size", 32), "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.3, 0.3)}
    other = ClipEncoder(
        model, SimpleTokenizer(), "small/none", clip.settings | {"vision_cfg": clip.settings["vision_cfg"] | settings}
    )
    with pytest.raises(WeightsError, match=message):
        image_tower(other)


def test_a_tokenizer_with_settings_of_its_own_is_refused():
    clip = public_clip()
    clip.settings["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    with pytest.raises(
        WeightsError, match="text tower with tokenizer_kwargs .*, which a tokenizer of transformers does not have"
    ):
        text_tower(clip, clip_tokenizer())
