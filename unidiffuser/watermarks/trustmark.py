"""Adobe's TrustMark (Bui, Agarwal, Collomosse, arXiv 2311.18297) with weights in a folder: learned, and for pictures of any kind.

It needs the package `trustmark`, which is no dependency of ours: ``pip install 'unidiffuser[trustmark]'``. The folder has the
files that TrustMark publishes of one of its models C, Q, B and P, here of Q: trustmark_Q.yaml, encoder_Q.ckpt, decoder_Q.ckpt.

TrustMark embeds 61 bits, and mends up to 5 that are read wrong. Ours are the 32 of the code and the first 24 of its SHA-256;
the others are 0. What TrustMark reads of a clean picture has these 29 bits with a probability of 2^-29.
"""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image

from unidiffuser.watermarks import CODE, Found, check_of

BITS = 61


class TrustMark:
    """The mark by the weights in a folder."""

    name, smallest = "trustmark", 1

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        """Load the weights.

        Raises:
            FileNotFoundError: there is no such folder, or a file of the model is missing; or the package is not installed.
        """
        self.folder = Path(folder)
        letter = self._letter()
        try:
            import trustmark
        except ImportError as error:
            raise FileNotFoundError(f"trustmark: not installed ({error}); pip install 'unidiffuser[trustmark]'") from None
        place = self.folder

        class ByPath(trustmark.TrustMark):
            """The package looks for weights beside its code, and fetches them."""

            def load_model(self, config: str, weights: str, *rest: Any, **more: Any) -> Any:
                return super().load_model(str(place / Path(config).name), str(place / Path(weights).name), *rest, **more)

            def check_and_download(self, filename: str) -> None:
                pass

        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            self.model = ByPath(verbose=False, device=device, model_type=letter, loadRemover=False)

    def _letter(self) -> str:
        """Which of TrustMark's models the folder has."""
        encoders = sorted(self.folder.glob("encoder_[CQBP].ckpt"))
        letter = encoders[0].stem[-1] if encoders else "Q"
        for name in (f"encoder_{letter}.ckpt", f"decoder_{letter}.ckpt", f"trustmark_{letter}.yaml"):
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.folder / name}: no such file; TrustMark publishes it with its weights")
        return letter

    def embed(self, picture: Image.Image, code: int) -> Image.Image:
        """The RGB picture with a code, 0 .. 2^32 - 1."""
        return self.model.encode(picture, f"{check_of(code) << CODE | code:0{BITS}b}", MODE="binary")

    def find(self, picture: Image.Image) -> Found | None:
        """The mark of a picture."""
        bits, sure, _ = self.model.decode(picture, MODE="binary")
        if not sure or len(bits) != BITS:
            return None
        read = int(bits, 2)
        code = read % 2**CODE
        return Found(self.name, code) if read >> CODE == check_of(code) else None
