"""The small CLIP: an open_clip model from a JSON configuration, trained on scenes and their captions.

Batches come in families: a scene and others that differ from it in one part only. A model that overlooks size or place
would otherwise do well, since two random scenes nearly always differ in drawing or background too.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from examples.encoders.captions import CONTEXT, scenes, tokenizer_in
from examples.encoders.progress import adamw, train
from examples.little_web.compose import BACKGROUNDS, DRAWINGS, PLACES, SIZES, Scene, caption, render

IMAGE_SIZE = 96
STEPS = 1400
FAMILIES, FAMILY = 24, 4
MEAN, DEVIATION = (0.5, 0.5, 0.5), (0.28, 0.28, 0.28)


def configuration(vocabulary: int, eos: int, pad: int) -> dict[str, Any]:
    """open_clip's `model_cfg`: 37 image tokens, and a causal text tower pooled at `<|EOS|>`."""
    return {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 16, "layers": 4, "width": 128, "head_width": 32},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "tokenizer",
            "width": 128,
            "heads": 4,
            "layers": 3,
            "pool_type": "eos",
            "eos_id": eos,
            "pad_id": pad,
        },
    }


def build(config: dict[str, Any]) -> open_clip.CustomTextCLIP:
    own = {name: value for name, value in config.items() if name != "custom_text"}
    return open_clip.CustomTextCLIP(**own, output_dict=True)


def family(rng: random.Random, size: int) -> list[Scene]:
    """A scene that is not held out, and others like it but for one part."""
    parts: dict[str, list[str]] = {
        "drawing": list(DRAWINGS),
        "size": list(SIZES),
        "place": list(PLACES),
        "background": list(BACKGROUNDS),
    }
    found: list[Scene] = []
    while len(found) < size:
        if not found:
            chosen: dict[str, Any] = {name: rng.choice(values) for name, values in parts.items()}
            scene = Scene(**chosen)
        else:
            name = rng.choice(list(parts))
            changed: dict[str, Any] = {name: rng.choice(parts[name])}
            scene = replace(found[0], **changed)
        if not scene.held_out and scene not in found:
            found.append(scene)
    return found


def pixels(batch: list[Scene]) -> torch.Tensor:
    """(B, 3, IMAGE_SIZE, IMAGE_SIZE), normalised as the model's preprocessing does."""
    array = np.stack([np.asarray(render(scene, IMAGE_SIZE)) for scene in batch])
    x = torch.from_numpy(array).permute(0, 3, 1, 2).float().div(255)
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def fit(state: Path, folder: Path, tokenizer_folder: Path, steps: int = STEPS) -> None:
    """Train with the symmetric contrastive loss, resuming from `state`, and write to `folder`."""
    torch.manual_seed(0)
    tokenizer = tokenizer_in(tokenizer_folder)
    config = configuration(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = build(config)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(f"clip {step}")
        batch = list(dict.fromkeys(scene for _ in range(FAMILIES) for scene in family(rng, FAMILY)))
        texts = [caption(scene, rng) for scene in batch]
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt").input_ids
        output = model(pixels([replace(scene, variation=rng.randrange(1, 2**31)) for scene in batch]), ids)
        logits = output["logit_scale"].clamp(max=100) * output["image_features"] @ output["text_features"].T
        target = torch.arange(len(batch))
        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        return loss, {"accuracy": (logits.argmax(1) == target).float().mean().item()}

    train(state / "clip.pt", model, loss_at, steps, adamw(1.5e-3).build(model.named_parameters()))
    save(model, config, folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def save(model: open_clip.CustomTextCLIP, config: dict[str, Any], folder: Path) -> None:
    """Write the folder that open_clip's "local-dir:" reads, in half precision.

    The image embedding, which is a token of UniDiffuser, is scaled to a deviation of one first; cosines do not see it.
    """
    model.eval()
    rng = random.Random(0)
    embeddings = model.encode_image(pixels(rng.sample(scenes(held_out=False), 64)))
    model.visual.proj /= embeddings.std()
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {"mean": MEAN, "std": DEVIATION, "interpolation": "bicubic", "resize_mode": "shortest"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
