"""The nodes' names and texts for ComfyUI's translations: `python -m scripts.locales` writes the English ones.

ComfyUI reads `locales/<language>/nodeDefs.json`. The English file is made from the schemas and shows what
there is to translate; the others are written by hand. A test holds all of them against the nodes.
"""

from __future__ import annotations

import asyncio
import json
from importlib import import_module
from typing import Any

from .comfy_host import REPOSITORY, import_pack

FOLDER = REPOSITORY / "locales"
SYNTAX = "{}@|"  # of vue-i18n, the frontend's library for translations


def english() -> dict[str, Any]:
    """Node id -> its names and texts, as `nodeDefs.json` has them.

    Texts with `SYNTAX` in them are left out: the frontend takes the node's own where it has no translation.
    """
    extension = import_module(".nodes", import_pack().__name__).DeltaConvExtension()
    return {node.GET_SCHEMA().node_id: _texts(node) for node in asyncio.run(extension.get_node_list())}


def _texts(node: Any) -> dict[str, Any]:
    schema = node.GET_SCHEMA()
    info = node.GET_NODE_INFO_V1()
    inputs = {
        name: _named(name, options.get("tooltip"))
        for kind in ("required", "optional")
        for name, (_, *more) in info["input"].get(kind, {}).items()
        for options in [more[0] if more else {}]
    }
    outputs = {
        str(number): _named(output.display_name or output.io_type, output.tooltip)
        for number, output in enumerate(schema.outputs)
    }
    texts = {"display_name": schema.display_name, "description": schema.description, "inputs": inputs}
    return texts | ({"outputs": outputs} if outputs else {})


def _named(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} | ({"tooltip": tooltip} if tooltip and not set(tooltip) & set(SYNTAX) else {})


def main() -> None:
    path = FOLDER / "en" / "nodeDefs.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(english(), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
