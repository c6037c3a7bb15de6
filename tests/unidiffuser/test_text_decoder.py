"""The text codec: its latent, its loss against a hand-made one, and captions that come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unidiffuser.text_decoder import EOS, TextCodec

CAPTIONS = [
    "a small panda on the left of a pink background",
    "a large red apple at the top, on a plain white background",
    "a blue background with a small lion in the centre",
]


@pytest.fixture
def codec() -> TextCodec:
    torch.manual_seed(0)
    return TextCodec.new("embedded", text_width=24, latent_width=8).eval()


def test_the_loss_is_the_mean_cross_entropy_of_each_caption_alone(codec: TextCodec) -> None:
    latent = torch.randn(3, 16, 8)
    total, count = 0.0, 0
    for row, text in zip(latent, CAPTIONS, strict=True):
        ids = codec.tokenizer.encode(text, add_special_tokens=False) + [codec.tokenizer.convert_tokens_to_ids(EOS)]
        embedded = torch.cat([codec.prefix(row), codec.gpt2.transformer.wte(torch.tensor(ids))])[None]
        log_probabilities = codec.gpt2(inputs_embeds=embedded).logits[0].log_softmax(-1)
        total -= sum(log_probabilities[15 + i, token].item() for i, token in enumerate(ids))
        count += len(ids)
    assert codec.loss(latent, CAPTIONS).item() == pytest.approx(total / count, rel=1e-4)


def test_a_caption_longer_than_the_latent_is_cut_and_still_ends(codec: TextCodec) -> None:
    ids, real = codec.caption_ids(["apple " * 40, "a lion"], length=16)
    assert ids.shape == (2, 16)
    assert ids[0, -1] == codec.eos and real[0].sum() == 16
    assert ids[1, real[1].sum() - 1] == codec.eos


def test_standardise_gives_unit_latents_and_the_same_captions(codec: TextCodec) -> None:
    hidden = 3 + 5 * torch.randn(64, 16, 24)
    before = codec.prefix(codec.encode(hidden))
    codec.standardise(hidden)
    latent = codec.encode(hidden).flatten(0, 1)
    assert latent.mean(0).abs().max() < 1e-3
    assert (latent.std(0) - 1).abs().max() < 1e-3
    assert torch.allclose(codec.prefix(codec.encode(hidden)), before, atol=1e-3)


def test_captions_come_back_after_a_short_training_and_after_saving(codec: TextCodec, tmp_path: Path) -> None:
    hidden = torch.randn(3, 16, 24)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        codec.loss(codec.encode(hidden), CAPTIONS, noise=0.1).backward()
        optimizer.step()
    latent = codec.encode(hidden)
    assert codec.decode(latent) == CAPTIONS
    assert codec.decode(latent, beams=1) == CAPTIONS
    codec.save(tmp_path)
    loaded = TextCodec.load(tmp_path)
    assert torch.equal(loaded.encode(hidden), latent)
    assert loaded.decode(latent) == CAPTIONS


def test_beams_are_those_of_transformers_own_search() -> None:
    torch.manual_seed(4)
    codec = TextCodec.new("embedded", text_width=24, latent_width=8).eval()
    latent = torch.randn(3, 16, 8)

    def by_hand(beams: int) -> list[str]:
        ids = codec.gpt2.generate(
            inputs_embeds=codec.prefix(latent), attention_mask=torch.ones(3, 16, dtype=torch.long), max_new_tokens=16,
            num_beams=beams, do_sample=False, eos_token_id=codec.eos, pad_token_id=codec.eos,
        )  # fmt: skip
        return [text.strip() for text in codec.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    written = {beams: by_hand(beams) for beams in (1, 2, 5)}
    assert len({tuple(captions) for captions in written.values()}) == 3, "the three must differ to prove anything"
    for beams, captions in written.items():
        assert codec.decode(latent, beams) == captions
    assert codec.decode(latent) == written[5]


def test_a_latent_for_which_gpt2_has_too_few_positions_is_refused_with_both_numbers(codec: TextCodec) -> None:
    assert codec.gpt2.config.n_positions == 64
    with torch.no_grad():
        codec.gpt2.transformer.wte.weight[codec.eos] = 0  # no caption ends before its last token
        assert len(codec.decode(torch.randn(1, 32, 8), beams=1)) == 1
        assert codec.loss(torch.randn(1, 32, 8), ["apple " * 40]).isfinite()
    with pytest.raises(ValueError, match="a text latent of 33 tokens and 32 of its caption take 65 positions, this GPT-2 has 64"):
        codec.decode(torch.randn(1, 33, 8))
    with pytest.raises(ValueError, match="a text latent of 33 tokens and 33 of its caption take 66 positions, this GPT-2 has 64"):
        codec.loss(torch.randn(1, 33, 8), ["apple " * 40])
    with pytest.raises(ValueError, match="a text latent of 77 tokens"):
        codec.loss(torch.randn(1, 77, 8), ["a lion"])


def test_a_vocabulary_without_an_end_gets_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "lion": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=3, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    codec = TextCodec.new(str(tmp_path), text_width=4, latent_width=2)
    assert codec.eos == 3
    assert codec.gpt2.get_input_embeddings().num_embeddings == 4
    codec.save(tmp_path / "codec")
    assert TextCodec.load(tmp_path / "codec").eos == 3


def test_a_folder_that_is_not_a_codec_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="codec.json"):
        TextCodec.load(tmp_path)
