"""The learned position table at another resolution: rows of grids are interpolated bilinearly, all others stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiffuser.modalities import Modality, token_order


def interpolate_grid(rows: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Rows (1, h*w, width) of one grid of ``old`` = (h, w) patches, for a grid of ``new`` patches."""
    grid = rows.reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new, mode="bilinear").to(rows.dtype)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def table_for(
    table: Tensor,
    modalities: Sequence[Modality],
    leading: int,
    grids: dict[str, tuple[int, int]],
) -> Tensor:
    """The table (1, tokens, width) of ``modalities``, for grids of other sizes.

    Args:
        table: ``leading`` rows of timestep tokens, then the parts' rows in ``token_order``.
        modalities: the declaration that the table was made for.
        leading: number of rows before the parts.
        grids: rows and columns of patches wanted, by name of the part; grids that are not named keep their size.
    """
    parts = token_order(modalities)
    if all(grids.get(part.name, part.patches) == part.patches for part in parts if part.is_grid):
        return table
    first, *pieces = table.split([leading, *(part.tokens for part in parts)], dim=1)
    for index, part in enumerate(parts):
        if part.is_grid and grids.get(part.name, part.patches) != part.patches:
            pieces[index] = interpolate_grid(pieces[index], part.patches, grids[part.name])
    return torch.cat([first, *pieces], dim=1)
