"""How much memory fetching takes: a large file from a server on this machine, checks included.

    python -m benchmarks.fetch_memory [--gigabytes 1.3]

Prints, for an https address and for the Hub, the highest resident memory during the fetch above that of the
same process before it (from /proc, so on Linux), and exits with status 1 when it is 200 MB or more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

LIMIT = 200e6  # bytes
MEGABYTE = os.urandom(1 << 20)


def main() -> int:
    """Measures both ways and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=1.3)
    size = int(parser.parse_args().gigabytes * 1e9)
    spawn = multiprocessing.get_context("spawn")
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_weights(Path(folder) / "weights.safetensors", size)
        ours, theirs = spawn.Pipe()
        server = spawn.Process(target=serve, args=(path, theirs), daemon=True)
        server.start()
        os.environ["DELTACONV_TEST_ALLOW_LOOPBACK"] = "1"
        os.environ["HF_ENDPOINT"] = ours.recv()
        for kind in ("https", "hub"):
            with spawn.Pool(1) as pool:
                peak, seconds = pool.apply(measure, (kind, os.environ["HF_ENDPOINT"], Path(folder) / kind))
            (Path(folder) / kind / "weights.safetensors").unlink()
            print(
                f"{kind}: {size / 1e9:.2f} GB in {seconds:.1f} s, "
                f"peak memory {peak / 1e6:.0f} MB above idle (limit {LIMIT / 1e6:.0f} MB)"
            )
            peaks.append(peak)
    return int(max(peaks) >= LIMIT)


def write_weights(path: Path, size: int) -> Path:
    """A safetensors file of `size` bytes with one tensor of bytes."""
    room = size - 8 - 256
    header = {"w": {"dtype": "U8", "shape": [room], "data_offsets": [0, room]}}
    text = json.dumps(header).encode().ljust(256)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, room, len(MEGABYTE)):
            file.write(MEGABYTE[: room - start])
    return path


def serve(path: Path, connection: Connection) -> None:
    """Serves the file at an address of its own and at one of the Hub, until the process is ended."""
    from testing.fault_server import Content, HubServer, serving

    with serving(HubServer()) as server:
        assert isinstance(server, HubServer)
        content = Content(path=path)
        server.files["/weights.safetensors"] = content
        server.add("owner/name", "weights.safetensors", content)
        connection.send(server.url)
        time.sleep(1e6)


def measure(kind: str, url: str, folder: Path) -> tuple[int, float]:
    """Fetches in this process. Returns bytes of memory above idle, and seconds."""
    import huggingface_hub.file_download  # noqa: F401  # loaded now, so that it counts as idle
    import requests  # noqa: F401
    import safetensors.numpy  # noqa: F401

    from deltaconv_core.weights.fetch import resolve
    from deltaconv_core.weights.manifest import HubSource, UrlSource
    from testing.weight_records import record

    source = (
        HubSource("owner/name", "weights.safetensors")
        if kind == "hub"
        else UrlSource(f"{url}/weights.safetensors")
    )
    idle = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    start = time.perf_counter()
    resolve(record(source), folder)
    return memory("VmHWM") - idle, time.perf_counter() - start


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


if __name__ == "__main__":
    sys.exit(main())
