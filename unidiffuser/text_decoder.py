"""Text latents and the decoder that turns them back into captions (paper, section 4.1 and appendix B).

CLIP's last hidden states (L tokens of width W) are projected to d numbers a token: that is the text which UniDiffuser
models. A GPT-2 reads the latent as a prefix of L embeddings and writes the caption behind it, up to `<|EOS|>`. Projection,
prefix and GPT-2 are trained together to reconstruct captions, CLIP frozen; then all is frozen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unidiffuser.references import local_folder
from unidiffuser.tensors import WeightsError, load_checked, pretrained, read_settings, read_tensors, reading, where

EOS = "<|EOS|>"


class TextCodec(nn.Module):
    """Projection W -> d, prefix d -> GPT-2 width, and GPT-2.

    Examples:
        >>> codec = TextCodec.new("embedded", clip.text_width, latent_width=32)
        >>> latent = codec.encode(clip.tokens(["a small panda at the top of a pink background"]))   # (1, 16, 32)
        >>> codec.decode(latent)
        ['a small panda at the top of a pink background']
    """

    def __init__(self, gpt2: Any, tokenizer: Any, text_width: int, latent_width: int) -> None:
        super().__init__()
        self.text_width, self.latent_width = text_width, latent_width
        self.projection = nn.Linear(text_width, latent_width)
        self.prefix = nn.Linear(latent_width, gpt2.config.n_embd)
        self.gpt2 = gpt2
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.convert_tokens_to_ids(EOS))

    @classmethod
    def new(cls, gpt2_ref: str, text_width: int, latent_width: int) -> TextCodec:
        """An untrained codec around a pretrained GPT-2; a vocabulary without `<|EOS|>` gets it.

        Raises:
            FileNotFoundError: a folder without the model. OSError: an unknown public name. WeightsError: tensors do not fit.
        """
        from transformers import AutoTokenizer, GPT2LMHeadModel

        folder = local_folder(gpt2_ref, "gpt2")
        source = folder or gpt2_ref
        gpt2 = pretrained(GPT2LMHeadModel, source, dtype=torch.float32)
        with reading(folder):
            tokenizer = AutoTokenizer.from_pretrained(**where(source))
        if EOS not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"eos_token": EOS})
            gpt2.resize_token_embeddings(len(tokenizer))
        return cls(gpt2, tokenizer, text_width, latent_width)

    def encode(self, hidden: Tensor) -> Tensor:
        """Project (B, L, W) hidden states of CLIP's text tower to the (B, L, d) latent."""
        return self.projection(hidden)

    def caption_ids(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Token ids of captions, each ended by `<|EOS|>`, cut to `length` and padded: (B, T), and which are real, (B, T)."""
        rows = [self.tokenizer.encode(text, add_special_tokens=False)[: length - 1] + [self.eos] for text in captions]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.eos] * (longest - len(row)) for row in rows])
        real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids.to(self.prefix.weight.device), real.to(self.prefix.weight.device)

    def loss(self, latent: Tensor, captions: Sequence[str], noise: float = 0.0) -> Tensor:
        """Mean cross-entropy in nats a token of the captions behind their latents.

        Args:
            latent: (B, L, d), from `encode`, or generated.
            noise: deviation of the noise added to the latent, in deviations of the latent itself. Latents that a diffusion
                model makes are never exact; a decoder trained with some noise forgives that.

        Raises:
            ValueError: GPT-2 has too few positions for latent and captions.
        """
        if noise:
            spread = latent.detach().std(dim=(0, 1), keepdim=True)
            latent = latent + noise * spread * torch.randn_like(latent)
        ids, real = self.caption_ids(captions, latent.shape[1])
        self._check_room(latent.shape[1], ids.shape[1])
        prefix = self.prefix(latent)
        embedded = torch.cat([prefix, self.gpt2.transformer.wte(ids)], dim=1)
        ones = torch.ones(prefix.shape[:2], dtype=real.dtype, device=real.device)
        output = self.gpt2(inputs_embeds=embedded, attention_mask=torch.cat([ones, real], dim=1), use_cache=False)
        logits = output.logits[:, prefix.shape[1] - 1 : -1]
        return nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids.masked_fill(real == 0, -100))

    def _check_room(self, prefix: int, behind: int) -> None:
        if prefix + behind > (positions := self.gpt2.config.n_positions):
            raise ValueError(
                f"a text latent of {prefix} tokens and {behind} of its caption take {prefix + behind} positions, this GPT-2 has "
                f"{positions}: take a larger GPT-2, or a CLIP of shorter captions"
            )

    @torch.no_grad()
    def standardise(self, hidden: Tensor) -> None:
        """Shift and scale the projection so that the latent of `hidden` (B, L, W) has mean 0 and deviation 1 in each of its d
        dimensions, and the prefix so that the decoder sees what it saw before. Diffusion noise assumes that scale."""
        latent = self.encode(hidden).flatten(0, 1)
        mean, std = latent.mean(0), latent.std(0).clamp_min(1e-6)
        self.prefix.bias.add_(self.prefix.weight @ mean)
        self.prefix.weight.mul_(std)
        self.projection.weight.div_(std[:, None])
        self.projection.bias.copy_((self.projection.bias - mean) / std)

    @torch.no_grad()
    def decode(self, latent: Tensor, beams: int = 5) -> list[str]:
        """Write the captions of (B, L, d) latents, by beam search (greedily with one beam), at most L tokens each.

        Raises:
            ValueError: GPT-2 has too few positions for L tokens and a caption of L tokens.
        """
        self._check_room(latent.shape[1], latent.shape[1] - 1)  # the last token is not read again
        prefix = self.prefix(latent.to(self.prefix.weight))
        ids = self.gpt2.generate(
            inputs_embeds=prefix,
            attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device),
            max_new_tokens=latent.shape[1],
            num_beams=beams,
            do_sample=False,
            eos_token_id=self.eos,
            pad_token_id=self.eos,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def save(self, folder: str | Path) -> None:
        """Write codec.json, codec.safetensors and gpt2/ (model and tokenizer)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        own = {name: value.contiguous() for name, value in self.state_dict().items() if not name.startswith("gpt2.")}
        save_file(own, folder / "codec.safetensors")
        self.gpt2.save_pretrained(folder / "gpt2", safe_serialization=True)
        self.tokenizer.save_pretrained(folder / "gpt2")
        widths = {"text_width": self.text_width, "latent_width": self.latent_width}
        (folder / "codec.json").write_text(json.dumps(widths, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> TextCodec:
        """Read a folder that `save` wrote, offline.

        Raises:
            FileNotFoundError: a file is missing. WeightsError: a file is damaged, or tensors do not fit.
        """
        folder = Path(folder)
        if not (folder / "codec.json").is_file():
            raise FileNotFoundError(f"{folder}: expected a text codec with codec.json, codec.safetensors and gpt2/")
        settings = read_settings(folder / "codec.json")
        text_width, latent_width = settings.get("text_width"), settings.get("latent_width")
        if not (type(text_width) is int and type(latent_width) is int and min(text_width, latent_width) > 0):
            raise WeightsError(
                f"{folder / 'codec.json'}: text_width is {text_width!r} and latent_width {latent_width!r}, expected whole numbers"
            )
        codec = cls.new(str(folder / "gpt2"), text_width, latent_width)
        ends = nn.ModuleDict({"projection": codec.projection, "prefix": codec.prefix})
        load_checked(ends, read_tensors(folder / "codec.safetensors"), folder / "codec.safetensors")
        return codec.eval()
