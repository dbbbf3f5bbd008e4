"""Everything that knows ComfyUI's inside: sites of a MODEL, patching, token grids, memory, folders, messages."""
