"""The stages by name. Modules are imported when asked for, and none imports torch or Ray at its top: a hit stays fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.runner.contract import Stage

STAGES = {
    "select": "stages.select.stage:Select",
    "download": "stages.download.stage:Download",
    "folder": "stages.folder.stage:Folder",
    "filter": "stages.filter.stage:Filter",
    "world": "stages.world.stage:World",
    "text-codec": "stages.encode.text_codec:TextCodecStage",
    "encode": "stages.encode.stage:Encode",
    "train": "stages.train.stage:Train",
    "evaluate": "stages.evaluate.stage:Evaluate",
    "export": "stages.evaluate.export:Export",
}
SUBSET_STAGES = ("select", "download", "filter", "encode")
# Of a corpus of one's own, which is there already.
FOLDER_STAGES = ("folder", "filter", "encode")
# Of a world that the project makes itself, with a codec of its own.
MADE_STAGES = ("world",)
ROW_STAGES = tuple(dict.fromkeys((*SUBSET_STAGES, *FOLDER_STAGES, *MADE_STAGES)))
# Those whose datasets are latents, which train reads.
LATENT_STAGES = ("encode", "world")


def stage_class(name: str) -> type[Stage]:
    """The class of a stage.

    Raises:
        KeyError: there is no such stage.
    """
    module, _, attribute = STAGES[name].partition(":")
    return getattr(import_module(module), attribute)
