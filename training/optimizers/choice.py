"""The choice of an optimizer by its `kind`.

A kind is a section with the fields `kind` and `lr`, the names `kept` of all tensors that it keeps beside the weights, how many
numbers it keeps of each number of a block's matrix (`matrix_state`), and the method `build`, which gives a torch optimizer for
named parameters. Each of its groups says beside torch's own fields: `names`, of its parameters; `state`, the names
of the fp32 tensors that it keeps of each of them, which checkpoints hold; `initial_lr`, its rate after the warm-up, which the
loop lets follow the schedule. Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from training.optimizers.adamw import AdamW
from training.optimizers.muon import Muon


def _kind(value: Any) -> str:
    return f"kind={value.get('kind', 'adamw') if isinstance(value, dict) else getattr(value, 'kind', None)}"


# `kind` may be left out for AdamW. The tags are parts of the path of an error, from which `kind=...` is left out.
OptimizerConfig = Annotated[
    Annotated[AdamW, Tag("kind=adamw")] | Annotated[Muon, Tag("kind=muon")],
    Discriminator(_kind, custom_error_type="kind", custom_error_message="an optimizer's kind is adamw or muon"),
]


def kind_that_keeps(names: Collection[str]) -> str:
    """The kind of the optimizer that keeps tensors of these names beside the weights."""
    return next((one.kind for one in (AdamW(), Muon()) if {*one.kept} == {*names}), "another")
