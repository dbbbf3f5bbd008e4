"""What ComfyUI's start costs because of this pack, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from scripts import comfy_host

CODE = """
import asyncio, importlib, json, sys
from pathlib import Path
from scripts import comfy_host
comfy_host.import_comfy()
import folder_paths
runs = Path(folder_paths.get_output_directory()) / "deltaconv_runs"
(runs / "run").mkdir(parents=True)
before, listed = set(sys.modules), []
sys.addaudithook(lambda event, given: listed.append(str(given[0])) if event in LISTING else None)
extension = asyncio.run(comfy_host.import_pack().comfy_entrypoint())
listing = asyncio.run(extension.get_node_list())
nodes = {node.GET_SCHEMA().node_id: node for node in listing}  # as ComfyUI registers them
started = {"modules": sorted(set(sys.modules) - before), "folders": list(listed)}
listed.clear()
nodes["DeltaConvDistill"].GET_NODE_INFO_V1()  # as for a page that is loaded
print(json.dumps(started | {"asked": str(runs) in listed}))
"""


def test_no_folder_is_searched_and_nothing_heavy_is_loaded():
    command = [sys.executable, "-c", 'LISTING = ("os.listdir", "os.scandir")\n' + CODE]
    done = subprocess.run(command, cwd=comfy_host.REPOSITORY, capture_output=True, text=True, check=True)
    added = json.loads(done.stdout.splitlines()[-1])
    assert any(name.endswith(".nodes.distill") for name in added["modules"])
    assert added["asked"]
    heavy = {"torch.utils.flop_counter", "jsonschema", "matplotlib", "diffusers", "huggingface_hub"}
    assert not set(added["modules"]) & heavy
    # Python itself lists the folders that it imports modules from.
    code = (comfy_host.REPOSITORY, Path(sys.prefix), Path(sys.base_prefix))
    assert [f for f in added["folders"] if not any(Path(f).is_relative_to(root) for root in code)] == []
