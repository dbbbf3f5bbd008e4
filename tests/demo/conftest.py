"""Makes `import demo` work without the repository's root on the path, where `nodes` would hide ComfyUI's
module."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "demo"

spec = importlib.util.spec_from_file_location(
    "demo", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
)
sys.modules["demo"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["demo"])
