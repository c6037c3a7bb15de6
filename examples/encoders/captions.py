"""The vocabulary and the small GPT-2: a byte-level BPE of 2,000 tokens, and a language model of the scenes' captions."""

from __future__ import annotations

import math
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from examples.encoders.progress import adamw, train
from examples.little_web.compose import PHRASINGS, Scene, all_scenes, caption
from unidiffuser.text_decoder import EOS

PAD = "<|PAD|>"
VOCABULARY = 2000
CONTEXT = 16  # tokens of a caption, the end included
STEPS = 500
BATCH = 64


def scenes(held_out: bool) -> list[Scene]:
    return [scene for scene in all_scenes() if scene.held_out == held_out]


def corpus() -> Iterator[str]:
    """Captions of scenes that are not held out, and the names of Unicode's pictures for other words."""
    rng = random.Random(0)
    for scene in scenes(held_out=False):
        for _ in PHRASINGS:
            yield caption(scene, rng)
    for code in range(0x1F300, 0x1FAFF):
        name = unicodedata.name(chr(code), "")
        if name:
            yield f"a {name.lower().replace('-', ' ')}"


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train the BPE, save it as a Hugging Face tokenizer, and return it. Every text ends in `<|EOS|>`; id 0 pads."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, bpe.token_to_id(EOS))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build(vocabulary: int) -> GPT2LMHeadModel:
    """The untrained language model: long enough for a prefix of CONTEXT latents and a caption behind it."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=64,
            n_embd=128,
            n_layer=4,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def loss_of(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Cross-entropy in nats a token, each caption behind an `<|EOS|>` that starts it."""
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt").input_ids
    start = torch.full((len(ids), 1), tokenizer.eos_token_id)
    logits = model(input_ids=torch.cat([start, ids[:, :-1]], dim=1), attention_mask=torch.ones_like(ids)).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids.masked_fill(ids == tokenizer.pad_token_id, -100))


def fit(state: Path, folder: Path, steps: int = STEPS) -> None:
    """Train the tokenizer if `folder` has none, then GPT-2 on captions, resuming from `state`."""
    torch.manual_seed(0)
    tokenizer = tokenizer_in(folder)
    model, seen = build(len(tokenizer)), scenes(held_out=False)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(f"captions {step}")
        loss = loss_of(model, tokenizer, [caption(rng.choice(seen), rng) for _ in range(BATCH)])
        return loss, {"perplexity": math.exp(loss.item())}

    train(state / "gpt2.pt", model, loss_at, steps, adamw(1e-3).build(model.named_parameters()))
    model.half().save_pretrained(folder, safe_serialization=True)


def tokenizer_in(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, trained first if there is none."""
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return make_tokenizer(folder)
