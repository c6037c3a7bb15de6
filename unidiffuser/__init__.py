"""UniDiffuser: the model and its mathematics, usable without the rest of the pipeline.

One transformer (U-ViT) predicts the noise of every modality at once, each modality with a timestep of its own
(Bao et al., "One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale", arXiv 2303.06555). A timestep
of 0 means that the modality is given, 1000 that it is marginalised out, so one network holds the marginal, the
conditional and the joint distributions.

    >>> import unidiffuser
    >>> model = unidiffuser.UniDiffuser.load("runs/export/3f9a2c")
    >>> model.generate("t2i", "a large red apple")[0].image.save("apple.png")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unidiffuser.generation import Generated as Generated
    from unidiffuser.generation import UniDiffuser as UniDiffuser
    from unidiffuser.references import Encoders as Encoders
    from unidiffuser.tasks import TASK_NAMES as TASK_NAMES

# Where each public name is; importing the package imports none of these, and no torch.
_HOMES = {"UniDiffuser": "generation", "Generated": "generation", "Encoders": "references", "TASK_NAMES": "tasks"}
__all__ = ["Encoders", "Generated", "TASK_NAMES", "UniDiffuser", "__version__"]


def __getattr__(name: str) -> Any:
    """The public names and ``__version__``, when they are first asked for (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("unidiffuser")
    if name not in _HOMES:
        raise AttributeError(f"module 'unidiffuser' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"unidiffuser.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
