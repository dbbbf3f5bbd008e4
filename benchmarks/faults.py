"""Kills, full disks and files that change under a running ComfyUI; afterwards nothing may be partial or lost.

    python -m benchmarks.faults [--kills 5] [--seed 0]

Each kill ends a server, or a process that saves or trains, with SIGKILL at a moment chosen at random; then a
new one must give the same pictures, resume a run to the same weights bit for bit, and find whole files only.
A full disk needs root (a small tmpfs is mounted); a read-only folder needs a user that is not root. Exits
with 1 if anything was unexpected. Linux only.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaconv_core import load_checkpoint, save_checkpoint
from deltaconv_core.distill import RunFolder, Settings, distill
from deltaconv_core.errors import DeltaConvError
from scripts.comfy_server import ComfyServer, ServerError
from testing.comfy_prompts import both, pictures, write_weights
from testing.comfy_servers import server_with
from testing.tiny_network import batches, make_mixers, make_network

from .soak import of_patch

SAVE = (
    "import sys, itertools; from pathlib import Path\n"
    "from deltaconv_core import load_checkpoint, save_checkpoint\n"
    "file = Path(sys.argv[1]); checkpoint = load_checkpoint(file); print('ready', flush=True)\n"
    "for n in itertools.count():\n"
    "    checkpoint.metadata['n'] = str(n)\n"
    "    save_checkpoint(checkpoint, file)\n"
)
DISTILL = (
    "import sys; from benchmarks import faults\n"
    "print('ready', flush=True); faults.train(faults.Path(sys.argv[1]), int(sys.argv[2]))\n"
)


class Unexpected(Exception):
    """What did not come out as it must."""


def train(folder: Path, steps: int) -> dict[str, Any]:
    """The weights of a tiny run after so many steps, resumed if it is there; every step is saved."""
    network = make_network()
    mixers = make_mixers(network)
    settings = Settings(layer_steps=2, output_steps=steps - 2, warmup=0, save_every=1)
    distill(network, mixers, batches, settings, RunFolder(folder))
    return {f"{id}.{n}": p.detach() for id, m in mixers.items() for n, p in m.named_parameters()}


def expect(good: bool, what: str) -> None:
    if not good:
        raise Unexpected(what)


def killed(code: str, arguments: list[str], seconds: float) -> None:
    """Runs Python code and kills it so many seconds after it said that it is ready."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        if process.stdout is not None:
            process.stdout.readline()
        time.sleep(seconds)
        process.kill()


def saving(choose: random.Random, folder: Path) -> None:
    """kill -9 while a file is saved over and over."""
    file = write_weights(folder / "mine.safetensors")
    killed(SAVE, [str(file)], choose.random() * 0.3)
    load_checkpoint(file)
    save_checkpoint(load_checkpoint(file), file)
    for part in folder.glob(".*.part"):
        os.utime(part, (0, 0))
    save_checkpoint(load_checkpoint(file), file)
    left = [path.name for path in folder.iterdir() if path != file]
    expect(not left, f"left behind: {left}")


def distilling(choose: random.Random, folder: Path) -> None:
    """kill -9 while a run is trained; resumed, it has the weights of one that never stopped."""
    killed(DISTILL, [str(folder / "run"), "400"], choose.random() * 1.5)
    saved = RunFolder(folder / "run").summary().step if RunFolder(folder / "run").exists else 0
    steps = max(saved, 2) + 3
    resumed, whole = train(folder / "run", steps), train(folder / "whole", steps)
    expect(all((resumed[name] == whole[name]).all() for name in whole), f"other weights from step {saved} on")


def sampling(choose: random.Random, folder: Path) -> None:
    """kill -9 of a server that samples; another one gives the same pictures."""
    with running(folder) as server:
        expected = pictures(server, server.run(both()))
        pid, wait = server.pid, choose.random() * 0.5
        threading.Thread(target=lambda: (time.sleep(wait), os.killpg(pid, signal.SIGKILL))).start()
        try:
            server.run(both(seed=8, steps=200))
        except (ServerError, OSError):
            pass
    with running(folder) as server:
        expect(pictures(server, server.run(both())) == expected, "another picture")


def full_disk(choose: random.Random, folder: Path) -> None:
    """Saves and runs on a disk without room: the project's own error, the old file, nothing partial."""
    with small_disk(folder / "disk") as disk:
        file = write_weights(disk / "mine.safetensors")
        before, checkpoint = file.read_bytes(), load_checkpoint(file)
        train(disk / "run", 3)
        kept = (disk / "run" / "state.safetensors").read_bytes()
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as fill:
            try:
                while True:
                    fill.write(b"x" * 4096)
            except OSError:
                pass
        refused(lambda: save_checkpoint(checkpoint, disk / "other.safetensors"))
        refused(lambda: save_checkpoint(checkpoint, file))
        refused(lambda: train(disk / "run", 5))
        expect(file.read_bytes() == before, "the old file is gone")
        expect((disk / "run" / "state.safetensors").read_bytes() == kept, "the old state is gone")
        names = {path.name for path in disk.rglob("*") if path.is_file()}
        expect(names == {"mine.safetensors", "filler", "state.safetensors", "log.csv"}, f"{names} are there")
        filler.unlink()
        resumed, whole = train(disk / "run", 5), train(folder / "whole", 5)
        expect(all((resumed[name] == whole[name]).all() for name in whole), "other weights after it")


def read_only(choose: random.Random, folder: Path) -> None:
    """Saves and runs in a folder that may not be written."""
    file = write_weights(folder / "mine.safetensors")
    checkpoint = load_checkpoint(file)
    folder.chmod(0o555)
    try:
        refused(lambda: save_checkpoint(checkpoint, folder / "other.safetensors"))
        refused(lambda: train(folder / "run", 3))
        expect([path.name for path in folder.iterdir()] == [file.name], "something was written")
    finally:
        folder.chmod(0o755)


def replaced_while_loaded(choose: random.Random, folder: Path) -> None:
    """A weights file that is cut short, overwritten, removed and put back while a server has it loaded."""
    with running(folder) as server:
        file = server.base / "models" / "deltaconv" / "small.safetensors"
        whole = file.read_bytes()
        expected = pictures(server, server.run(both()))
        for content in (whole[: len(whole) // 2], b"<html>", None):
            file.unlink() if content is None else file.write_bytes(content)
            try:
                said = server.failure(server.queue(of_patch()(8)))
            except ServerError as error:
                said = str(error)
            expect("small.safetensors" in said, f"a damaged file: {said[:200]}")
        file.write_bytes(whole)
        expect(pictures(server, server.run(both())) == expected, "another picture")


def refused(action: Callable[[], object]) -> None:
    try:
        action()
    except DeltaConvError:
        return
    raise Unexpected("was not refused")


@contextmanager
def running(folder: Path) -> Iterator[ComfyServer]:
    with server_with("plain_nodes", folder) as server:
        write_weights(server.base / "models" / "deltaconv" / "small.safetensors")
        yield server


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 2 MB; mounting needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def main() -> int:
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument(
        "--kills", type=int, default=5, help="of each kind; of servers a third (%(default)d)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the moments (%(default)d)")
    args = command.parse_args()
    root = os.geteuid() == 0
    plan = [(saving, args.kills), (distilling, args.kills), (sampling, (args.kills + 2) // 3)]
    plan += [(full_disk, int(root)), (read_only, int(not root)), (replaced_while_loaded, 1)]
    choose, unexpected = random.Random(args.seed), 0
    for fault, times in plan:
        wrong = []
        for _ in range(times):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    fault(choose, Path(folder))
                except Exception as error:  # whatever it is, it was not expected
                    wrong.append(f"{type(error).__name__}: {str(error)[:300]}")
        print(f"{fault.__name__}: {times} times, {len(wrong)} unexpected", *wrong, sep="\n  ", flush=True)
        unexpected += len(wrong)
    print(f"{unexpected} unexpected")
    return bool(unexpected)


if __name__ == "__main__":
    sys.exit(main())
