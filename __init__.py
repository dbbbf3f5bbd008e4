"""ComfyUI-DeltaConv: ΔConv in place of self-attention, as ComfyUI nodes.

ComfyUI imports this folder and calls `comfy_entrypoint`. Without ComfyUI, importing it does nothing.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import DeltaConvExtension

    return DeltaConvExtension()
