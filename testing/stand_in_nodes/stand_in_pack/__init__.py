"""Has the server that loads this know the small models of `testing.comfy_model_files`; no nodes."""

from testing import comfy_model_files

comfy_model_files.register()

NODE_CLASS_MAPPINGS = {}
