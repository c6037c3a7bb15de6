"""The caption codec, which needs no training: 7 words, each a scaled unit vector, less the mean of all captions, (7, 21)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.shapes.world import PHRASINGS, all_captions, joint

WORD_SCALE = 2.5
PAD = ""
WORDS = (PAD, *sorted({word for text, _ in all_captions() for word in text.split()}))
LENGTH = max(len(text.split()) for text, _ in all_captions())
NUMBER_OF_WORD = {word: number for number, word in enumerate(WORDS)}


def _unit_vectors(captions: list[str]) -> Tensor:
    """(n, 7, 21); what is left of the length is padding."""
    padded = [[*text.split(), *[PAD] * (LENGTH - len(text.split()))] for text in captions]
    return F.one_hot(torch.tensor([[NUMBER_OF_WORD[word] for word in row] for row in padded]), len(WORDS)).float()


# The mean over the world's captions, all phrasings being equally likely.
_MEAN = torch.einsum(
    "n,nlw->lw",
    torch.from_numpy(joint().ravel().repeat(len(PHRASINGS)) / len(PHRASINGS)).float(),
    _unit_vectors([text for text, _ in all_captions()]),
)


def encode_captions(captions: list[str]) -> Tensor:
    """Latents (n, 7, 21) of captions of the grammar."""
    return WORD_SCALE * (_unit_vectors(captions) - _MEAN)


def decode_captions(latents: Tensor) -> list[str]:
    """The nearest words of latents (n, 7, 21); padding before another word leaves a double space, which no caption has."""
    nearest = (latents / WORD_SCALE + _MEAN).argmax(-1)
    return [" ".join(WORDS[number] for number in row).rstrip() for row in nearest.tolist()]
