"""ComfyUI nodes; one file each."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .benchmark import Benchmark
from .compare import Compare
from .convert_model import ConvertModel
from .demo_model import DemoLatent, DemoModel, JointDemoModel
from .demo_prompt import DemoPrompt
from .distill import Distill
from .host.files import model_folder
from .load_weights import LoadWeights
from .locality import AttentionLocality
from .neighborhood import NeighborhoodAttention
from .patch_model import PatchModel
from .save_weights import SaveWeights

model_folder.register()


class DeltaConvExtension(ComfyExtension):
    """What ComfyUI asks for the nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            PatchModel,
            ConvertModel,
            LoadWeights,
            Distill,
            SaveWeights,
            AttentionLocality,
            NeighborhoodAttention,
            Benchmark,
            Compare,
            DemoModel,
            JointDemoModel,
            DemoPrompt,
            DemoLatent,
        ]
