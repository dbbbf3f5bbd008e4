"""All that knows ComfyUI's inside: sites of a MODEL, patches, token grids, memory, folders, reports."""
