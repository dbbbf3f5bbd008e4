"""What ComfyUI's start costs because of this pack, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from scripts import comfy_host

CODE = """
import importlib, json, sys
from pathlib import Path
from scripts import comfy_host
comfy_host.import_comfy()
import folder_paths
(Path(folder_paths.get_output_directory()) / "deltaconv_runs" / "run").mkdir(parents=True)
before, listed = set(sys.modules), []
sys.addaudithook(lambda event, given: listed.append(str(given[0])) if event in LISTING else None)
importlib.import_module(".nodes", comfy_host.import_pack().__name__)
print(json.dumps({"modules": sorted(set(sys.modules) - before), "folders": listed}))
"""


def test_no_folder_is_searched_and_nothing_heavy_is_loaded():
    command = [sys.executable, "-c", 'LISTING = ("os.listdir", "os.scandir")\n' + CODE]
    done = subprocess.run(command, cwd=comfy_host.REPOSITORY, capture_output=True, text=True, check=True)
    added = json.loads(done.stdout.splitlines()[-1])
    assert any(name.endswith(".nodes.distill") for name in added["modules"])
    heavy = {"torch.utils.flop_counter", "jsonschema", "matplotlib", "diffusers", "huggingface_hub"}
    assert not set(added["modules"]) & heavy
    # Python itself lists the folders that it imports modules from.
    code = (comfy_host.REPOSITORY, Path(sys.prefix), Path(sys.base_prefix))
    assert [f for f in added["folders"] if not any(Path(f).is_relative_to(root) for root in code)] == []
