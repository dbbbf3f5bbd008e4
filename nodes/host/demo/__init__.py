"""The bundled model as ComfyUI sees it."""
