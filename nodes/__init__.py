"""ComfyUI nodes; one file each."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .demo_model import DemoLatent, DemoModel
from .demo_prompt import DemoPrompt
from .host import folder
from .load_weights import LoadWeights
from .patch_model import PatchModel

folder.register()


class DeltaConvExtension(ComfyExtension):
    """What ComfyUI asks for the nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [PatchModel, LoadWeights, DemoModel, DemoPrompt, DemoLatent]
