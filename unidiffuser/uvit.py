"""U-ViT, the joint noise prediction network (arXiv 2303.06555 section 4.2 and table 3; U-ViT: arXiv 2209.12152).

A transformer over the concatenated tokens of all modalities, with one timestep token for each modality, long skip
connections between the first and the last half of its blocks, and post-layer-norm blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unidiffuser.linear import Linear
from unidiffuser.modalities import (
    Modality,
    Part,
    check_modalities,
    paper_modalities,
    token_order,
)
from unidiffuser.noise import NoiseConfig
from unidiffuser.positions import table_for


class UViTConfig(BaseModel):
    """Sizes of a U-ViT; the defaults are the paper's.

    ``depth`` counts the blocks on both sides of the middle block, so depth 30 has 31 blocks. ``position_std`` is the
    initial scale of the position table: 0.02 in the paper, and too small beside patch embeddings of 0.55 for a model that
    trains for minutes (0.5 lets it learn where things stand). ``data_type_token`` adds the data-type token of version 1.
    ``noise`` is what it was trained with, and so what it must be sampled with.
    ``activation_checkpointing`` n recomputes every n-th block in the backward pass instead of keeping its activations; 0 none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: PositiveInt = 1536
    depth: Annotated[int, Field(ge=2)] = 30
    heads: PositiveInt = 24
    mlp_ratio: PositiveFloat = 4
    modalities: tuple[Modality, ...] = paper_modalities()
    position_std: PositiveFloat = 0.02
    data_type_token: bool = False
    noise: NoiseConfig = NoiseConfig()
    activation_checkpointing: NonNegativeInt = 0

    @model_validator(mode="after")
    def _sizes_fit(self) -> UViTConfig:
        if self.depth % 2:
            raise ValueError(f"depth must be even, half before and half after the middle block, not {self.depth}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width {self.width} must be even and a multiple of heads {self.heads}")
        check_modalities(self.modalities)
        return self

    @property
    def tokens(self) -> int:
        """Rows of the position table: one a modality's timestep and one a token of every part."""
        return len(self.modalities) + sum(part.tokens for part in token_order(self.modalities))


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B, width) of timesteps (B,): cosines then sines, frequencies from 1 down to 1/10000."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# Up to so many tokens, torch's own attention for CPUs takes more than twice the time of the products written out.
FEW_TOKENS = 32


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention, (B, heads, tokens, width), by two products and a softmax."""
    return ((query * query.shape[-1] ** -0.5) @ key.mT).softmax(-1) @ value


class Attention(nn.Module):
    """Multi-head self-attention without query, key and value biases, in whatever type its input arrives."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        few = x.device.type == "cpu" and tokens <= FEW_TOKENS
        attended = plain_attention(query, key, value) if few else F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A post-layer-norm transformer block; with ``skip``, it first merges the output of an earlier block.

    UniDiffuser moved the norms of U-ViT behind the residual sums, and added one behind the skip's linear layer, so that
    the network trains in half precision (section 4.2).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, skip: bool) -> None:
        super().__init__()
        self.skip_linear = Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width) if skip else None
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, round(width * mlp_ratio))
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and self.norm1 is not None:
            x = self.norm1(self.skip_linear(torch.cat([x, skip], dim=-1)))  # type: ignore[list-item]
        x = self.norm2(x + self.attn(x))
        return self.norm3(x + self.mlp(x))


def _input_layer(part: Part, width: int) -> nn.Module:
    if part.is_grid:
        return nn.Conv2d(part.shape[0], width, kernel_size=part.patch, stride=part.patch)
    return Linear(part.token_width, width)


class UViT(nn.Module):
    """Predicts the noise of every part from all noised parts and one timestep for each modality."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.config = config
        self.parts = token_order(config.modalities)
        width, half = config.width, config.depth // 2

        def block(skip: bool) -> Block:
            return Block(width, config.heads, config.mlp_ratio, skip)

        self.inputs = nn.ModuleDict({part.name: _input_layer(part, width) for part in self.parts})
        self.position = nn.Parameter(torch.empty(1, config.tokens, width))
        if config.data_type_token:
            self.data_type_embedding = nn.Embedding(2, width)
            self.data_type_position = nn.Parameter(torch.zeros(1, 1, width))
        self.in_blocks = nn.ModuleList(block(skip=False) for _ in range(half))
        self.mid_block = block(skip=False)
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.outputs = nn.ModuleDict({part.name: Linear(width, part.token_width) for part in self.parts})
        self._initialise()

    def _initialise(self) -> None:
        """U-ViT's start: linear layers truncated normal 0.02, biases 0; the patch convolution as torch starts it."""
        nn.init.trunc_normal_(self.position, std=self.config.position_std, a=-3 * self.config.position_std,
                              b=3 * self.config.position_std)  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Mapping[str, Tensor],
        t: Mapping[str, Tensor | float],
        data_type: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Predict the noise in every part.

        Args:
            x: noised parts by name, each (B, *shape). Grids may have another size than the configuration's, a multiple of the
                patch; their rows of the position table are then interpolated.
            t: timesteps by name of the modality, (B,) or one number for the batch; 0 is clean, 1000 is pure noise.
            data_type: (B,) or one number, 0 or 1, for a model with a data-type token.

        Returns:
            The predicted noise by name of the part, in the shapes of ``x``.

        Raises:
            ValueError: a part has the wrong shape, or the data type is missing.
        """
        batch = x[self.parts[0].name].shape[0]
        device = self.position.device
        times = [self._timestep_token(t[modality.name], batch, device) for modality in self.config.modalities]
        bodies = [self._tokens_of(part, x[part.name]) for part in self.parts]
        grids = {part.name: self._patches_of(part, x[part.name]) for part in self.parts if part.is_grid}
        position = table_for(self.position, self.config.modalities, len(times), grids)
        if self.config.data_type_token:
            if data_type is None:
                raise ValueError("this model has a data-type token: pass data_type=0 or 1")
            kinds = torch.as_tensor(data_type, device=device).expand(batch)
            bodies.insert(0, self.data_type_embedding(kinds)[:, None])
            position = torch.cat(
                [
                    position[:, : len(times)],
                    self.data_type_position,
                    position[:, len(times) :],
                ],
                1,
            )
        hidden = self._transform(torch.cat([*times, *bodies], dim=1) + position)

        sizes = [body.shape[1] for body in bodies]
        pieces = hidden[:, len(times) :].split(sizes, dim=1)[-len(self.parts) :]
        return {
            part.name: self._shaped(part, self.outputs[part.name](piece), x[part.name])
            for part, piece in zip(self.parts, pieces, strict=True)
        }

    def _transform(self, hidden: Tensor) -> Tensor:
        skips = []
        for number, block in enumerate(self.in_blocks):
            hidden = self._run(number, block, hidden)
            skips.append(hidden)
        hidden = self._run(len(skips), self.mid_block, hidden)
        for number, block in enumerate(self.out_blocks, len(skips) + 1):
            hidden = self._run(number, block, hidden, skips.pop())
        return self.norm(hidden)

    def _run(self, number: int, block: nn.Module, *inputs: Tensor) -> Tensor:
        every = self.config.activation_checkpointing
        if every and number % every == 0 and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _timestep_token(self, t: Tensor | float, batch: int, device: torch.device) -> Tensor:
        t = torch.as_tensor(t, device=device, dtype=torch.float32).expand(batch)
        return timestep_embedding(t, self.config.width)[:, None].to(self.position.dtype)

    def _tokens_of(self, part: Part, x: Tensor) -> Tensor:
        expected = part.shape[:1] if part.is_grid else part.shape
        if tuple(x.shape[1 : 1 + len(expected)]) != expected or x.dim() != 1 + len(part.shape):
            raise ValueError(f"part {part.name}: expected (B, {', '.join(map(str, part.shape))}), got {tuple(x.shape)}")
        tokens = self.inputs[part.name](x.to(self.position.dtype))
        if part.is_grid:
            return tokens.flatten(2).transpose(1, 2)
        return tokens if len(part.shape) == 2 else tokens[:, None]

    @staticmethod
    def _patches_of(part: Part, x: Tensor) -> tuple[int, int]:
        if x.shape[2] % part.patch or x.shape[3] % part.patch:
            raise ValueError(f"part {part.name}: patches of {part.patch} do not divide {x.shape[2]}x{x.shape[3]}")
        return x.shape[2] // part.patch, x.shape[3] // part.patch

    def _shaped(self, part: Part, tokens: Tensor, like: Tensor) -> Tensor:
        if not part.is_grid:
            return tokens if len(part.shape) == 2 else tokens[:, 0]
        rows, columns = self._patches_of(part, like)
        patches = tokens.view(-1, rows, columns, part.patch, part.patch, part.shape[0])
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(like.shape)


def resize_positions(state: Mapping[str, Tensor], old: UViTConfig, new: UViTConfig) -> dict[str, Tensor]:
    """The weights of a model of configuration ``old`` for a model of ``new``, whose grids have other sizes.

    Args:
        state: ``UViT.state_dict()`` of the old model; it is not changed.

    Raises:
        ValueError: the two differ in more than the sizes of their grids.
    """
    old_parts, new_parts = token_order(old.modalities), token_order(new.modalities)
    fixed_old = [(p.name, p.patch, p.shape[0] if p.is_grid else p.shape) for p in old_parts]
    fixed_new = [(p.name, p.patch, p.shape[0] if p.is_grid else p.shape) for p in new_parts]
    if fixed_old != fixed_new:
        raise ValueError(f"only the sizes of grids may differ: {fixed_old} became {fixed_new}")
    for field in ("width", "depth", "heads", "mlp_ratio", "data_type_token"):
        if getattr(old, field) != getattr(new, field):
            raise ValueError(f"only the sizes of grids may differ: {field} {getattr(old, field)} became {getattr(new, field)}")
    grids = {part.name: part.patches for part in new_parts if part.is_grid}
    table = table_for(state["position"], old.modalities, len(old.modalities), grids)
    return {**state, "position": table.contiguous()}
