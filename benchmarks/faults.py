"""Kills, full disks and files that change under a running ComfyUI; afterwards nothing may be partial or lost.

    python -m benchmarks.faults [--kills 5] [--seed 0]

Each kill ends a server, or a process that saves, fetches or trains, with SIGKILL at a moment chosen at
random; then a new one must give the same pictures, go on with the bytes that are there, resume a run to the
same weights bit for bit, and find whole files only. Full disks need root (a small tmpfs is mounted), and so
do disks under a running server; a read-only folder is such a disk, or has no write permission. Exits with 1
if anything was unexpected. Linux only.
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
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from deltaconv_core import load_checkpoint, save_checkpoint
from deltaconv_core.distill import RunFolder, Settings, distill
from deltaconv_core.errors import DeltaConvError
from deltaconv_core.weights.fetch import resolve
from deltaconv_core.weights.fetch.address import ALLOW_LOOPBACK
from deltaconv_core.weights.manifest import UrlSource
from scripts.comfy_server import ComfyServer, ServerError
from testing.comfy_prompts import both, node, pictures, write_weights
from testing.comfy_servers import server_with
from testing.fault_server import Content, FaultServer, serving
from testing.tiny_network import batches, make_mixers, make_network
from testing.weight_records import record, weights

from .soak import of_patch

SAVE = (
    "import sys, itertools; from pathlib import Path\n"
    "from deltaconv_core import load_checkpoint, save_checkpoint\n"
    "file = Path(sys.argv[1]); checkpoint = load_checkpoint(file); print('ready', flush=True)\n"
    "for n in itertools.count():\n"
    "    checkpoint.metadata['n'] = str(n)\n"
    "    save_checkpoint(checkpoint, file)\n"
)
FETCH = (
    "import sys; from benchmarks import faults\n"
    "print('ready', flush=True); faults.fetch(f'{sys.argv[1]}/{faults.FETCHED}', faults.Path(sys.argv[2]))\n"
)
DISTILL = (
    "import sys; from benchmarks import faults\n"
    "print('ready', flush=True); faults.train(faults.Path(sys.argv[1]), int(sys.argv[2]))\n"
)


ROOT = os.geteuid() == 0
WEIGHTS = weights(400_000)
FETCHED = "fetched.safetensors"


class Unexpected(Exception):
    """What did not come out as it must."""


def train(folder: Path, steps: int) -> dict[str, Any]:
    """The weights of a tiny run after so many steps, resumed if it is there; every step is saved.

    The learning rate is that of every other number of steps, too: it does not fall at the end.
    """
    network = make_network()
    mixers = make_mixers(network)
    settings = Settings(layer_steps=2, output_steps=steps - 2, warmup=0, decay=0, save_every=1)
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
    killed(DISTILL, [str(folder / "run"), "400"], choose.random() * 3)
    saved = RunFolder(folder / "run").summary().step if RunFolder(folder / "run").exists else 0
    steps = max(saved, 2) + 3
    resumed, whole = train(folder / "run", steps), train(folder / "whole", steps)
    expect(all((resumed[name] == whole[name]).all() for name in whole), f"other weights from step {saved} on")


def fetch(url: str, folder: Path) -> Path:
    """Fetches the file at an address into a folder."""
    return resolve(record(UrlSource(url), WEIGHTS, name="fetched"), folder)


def fetching(choose: random.Random, folder: Path) -> None:
    """kill -9 while a file is fetched, a few times in a row; then only what is missing comes."""
    with served() as server:
        server.rate = 2 * len(WEIGHTS)
        for _ in range(3):
            killed(FETCH, [server.url, str(folder)], choose.random() * 0.3)
            whole = [path for path in folder.iterdir() if path.name == FETCHED]
            expect(all(path.read_bytes() == WEIGHTS for path in whole), "a partial file after a kill")
        parts = [path.stat().st_size for path in folder.glob("*.part")]
        asked = len(server.seen)
        expect(fetch(f"{server.url}/{FETCHED}", folder).read_bytes() == WEIGHTS, "another file")
        sent = sum(request.sent for request in server.seen[asked:])
        missing = 0 if whole else len(WEIGHTS) - max(parts, default=0)
        expect(sent == missing, f"{sent} bytes came, {missing} were missing")
        expect(not list(folder.glob("*.part")), "a part is left")


@contextmanager
def served() -> Iterator[FaultServer]:
    """A server with the file, that takes no notice of whoever hangs up."""
    server = FaultServer()
    server.handle_error = lambda request, address: None  # type: ignore[method-assign]
    server.files[f"/{FETCHED}"] = Content(WEIGHTS)
    with serving(server):
        yield server


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
        filler = fill(disk)
        refused(lambda: save_checkpoint(checkpoint, disk / "other.safetensors"))
        refused(lambda: save_checkpoint(checkpoint, file))
        refused(lambda: train(disk / "run", 5))
        refused(lambda: fetched(disk))
        expect(file.read_bytes() == before, "the old file is gone")
        expect((disk / "run" / "state.safetensors").read_bytes() == kept, "the old state is gone")
        names = {path.name for path in disk.rglob("*") if path.is_file()}
        expect(FETCHED not in names and "other.safetensors" not in names, f"{names} are there")
        filler.unlink()
        expect(fetched(disk).read_bytes() == WEIGHTS, "another file")
        save_checkpoint(checkpoint, disk / "other.safetensors")
        resumed, whole = train(disk / "run", 5), train(folder / "whole", 5)
        expect(all((resumed[name] == whole[name]).all() for name in whole), "other weights after it")


def full_while_fetching(choose: random.Random, folder: Path) -> None:
    """The disk has less room than the file needs."""
    with small_disk(folder / "disk", len(WEIGHTS) // 2 >> 10) as disk:
        refused(lambda: fetched(disk))
        names = {path.name for path in disk.iterdir()}
        expect(FETCHED not in names, f"{names} are there")
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        expect(fetched(disk).read_bytes() == WEIGHTS, "another file")


def read_only(choose: random.Random, folder: Path) -> None:
    """Saves, runs and fetches in a folder that may not be written."""
    with small_disk(folder / "disk") if ROOT else nullcontext(folder) as place:
        file = write_weights(place / "mine.safetensors")
        before, checkpoint = file.read_bytes(), load_checkpoint(file)
        with unwritable(place):
            refused(lambda: save_checkpoint(checkpoint, place / "other.safetensors"))
            refused(lambda: save_checkpoint(checkpoint, file))
            refused(lambda: train(place / "run", 3))
            refused(lambda: fetched(place))
            expect([path.name for path in place.iterdir()] == [file.name], "something was written")
            expect(load_checkpoint(file).blocks.keys() == checkpoint.blocks.keys(), "cannot be read")
        expect(file.read_bytes() == before, "the file has changed")
        save_checkpoint(checkpoint, place / "other.safetensors")


def disks_of_a_server(choose: random.Random, folder: Path) -> None:
    """A server whose model folder is full, then read-only, then as usual."""
    with running(folder) as server, small_disk(server.base / "models" / "deltaconv") as disk:
        write_weights(disk / "small.safetensors")
        expected = pictures(server, server.run(both()))
        for broken in (full, unwritable):
            with broken(disk):
                before = {path.name for path in disk.iterdir()}
                said = server.failure(server.queue(save_prompt(broken.__name__)))
                expect("cannot" in said and "Traceback" not in said, f"saving said {said[:200]!r}")
                expect({path.name for path in disk.iterdir()} == before, "something was written")
                expect(pictures(server, server.run(both())) == expected, "another picture")
        server.run(save_prompt("whole"))
        load_checkpoint(disk / "whole_00001.safetensors")
        names = {path.name for path in disk.iterdir()}
        expect(names == {"small.safetensors", "whole_00001.safetensors"}, f"{names} are there")


def save_prompt(name: str) -> dict[str, Any]:
    """Loads the weights and saves them under a name."""
    saved = node("DeltaConvSaveWeights", deltaconv=["loaded", 0], filename_prefix=name, dtype="fp32")
    return {"loaded": node("DeltaConvLoadWeights", weights="small.safetensors"), "saved": saved}


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


def fetched(folder: Path) -> Path:
    """`fetch` from a server that behaves."""
    with served() as server:
        return fetch(f"{server.url}/{FETCHED}", folder)


@contextmanager
def small_disk(folder: Path, kilobytes: int = 2048) -> Iterator[Path]:
    """A disk of its own; mounting needs root."""
    folder.mkdir(exist_ok=True)
    size = f"size={kilobytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Inside, a small disk has no room left."""
    filler = fill(disk)
    try:
        yield
    finally:
        filler.unlink()


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return filler


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Inside, nothing in a folder can be written: for root, who may write anywhere, its disk is read-only."""
    if ROOT:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        if ROOT:
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        else:
            folder.chmod(0o755)


def main() -> int:
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument(
        "--kills", type=int, default=5, help="of each kind; of servers a third (%(default)d)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the moments (%(default)d)")
    args = command.parse_args()
    os.environ.update({ALLOW_LOOPBACK: "1", "TQDM_DISABLE": "1"})
    plan = [(saving, args.kills), (fetching, args.kills), (distilling, args.kills)]
    plan += [(sampling, (args.kills + 2) // 3), (replaced_while_loaded, 1), (read_only, 1)]
    plan += [(fault, int(ROOT)) for fault in (full_disk, full_while_fetching, disks_of_a_server)]
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
