"""A real ComfyUI server for a while: starts, runs prompts, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from .comfy_host import PACK_NAME, REPOSITORY, find_host

# Called with a websocket message's type and data ("executing", "progress", "execution_error", ...;
# "progress_text", with "node" and "text", for what is to stand under a node).
OnMessage = Callable[[str, dict[str, Any]], None]

TEXT = (3).to_bytes(4, "big")  # BinaryEventTypes.TEXT of ComfyUI's protocol


class ServerError(RuntimeError):
    """The server did not start, or answered with an error; `details` is its JSON answer, if it gave one."""

    def __init__(self, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = details or {}


def free_port() -> int:
    """A loopback port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ComfyServer:
    """A ComfyUI on a free loopback port, with a base directory of its own.

    `with ComfyServer() as server:` starts it and waits until it answers; leaving the block, by whatever way,
    kills it with everything it started and removes its directory.

    Args:
        pack: the folder to link into custom_nodes; None for a ComfyUI without extensions.
        extra_args: further arguments for ComfyUI.
        pytorch_attention: pass --use-pytorch-cross-attention, instead of ComfyUI's own choice for CPUs.
        environment: variables to set for the server.
        start_timeout: seconds to wait for the first answer.
    """

    def __init__(
        self,
        pack: Path | None = REPOSITORY,
        extra_args: Sequence[str] = (),
        *,
        pytorch_attention: bool = True,
        environment: dict[str, str] | None = None,
        start_timeout: float = 300.0,
    ) -> None:
        self.pack = pack
        self.extra_args = [*(["--use-pytorch-cross-attention"] if pytorch_attention else []), *extra_args]
        self.environment = environment or {}
        self.start_timeout = start_timeout
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    # ---- life ----

    def __enter__(self) -> ComfyServer:
        self._directory = tempfile.TemporaryDirectory(prefix="deltaconv-server-", ignore_cleanup_errors=True)
        self.base = Path(self._directory.name)
        try:
            self._make_base()
            self._start()
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill the server and everything it started, and remove its directory. Safe to call again."""
        if self._process is not None:
            self._kill(self._process)
            self._process = None
        self._directory.cleanup()

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        if os.name == "posix":
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:
            process.kill()
        process.wait()
        if process.stdin:
            process.stdin.close()

    def _make_base(self) -> None:
        for name in ("custom_nodes", "input", "output", "temp", "user", "models/deltaconv"):
            (self.base / name).mkdir(parents=True)
        if self.pack is not None:
            (self.base / "custom_nodes" / PACK_NAME).symlink_to(self.pack.resolve(), target_is_directory=True)

    def _start(self) -> None:
        host = find_host()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "scripts.comfy_start", str(host)]
        command += ["--cpu", "--port", str(port), "--base-directory", str(self.base)]
        command += ["--user-directory", str(self.base / "user"), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--disable-auto-launch", *self.extra_args]
        with (self.base / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end tells the server that we are gone
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
                start_new_session=True,
            )

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while True:
            if self._process is None or self._process.poll() is not None:
                raise ServerError(f"ComfyUI stopped while starting. The end of its log:\n{self.log[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except (OSError, ServerError):
                pass
            if time.monotonic() > deadline:
                raise ServerError(
                    f"ComfyUI did not answer in {self.start_timeout:g} s. "
                    f"The end of its log:\n{self.log[-3000:]}"
                )
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        """The server's process id, which is also its process group's."""
        if self._process is None:
            raise ServerError("The server is not running.")
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    # ---- requests ----

    def request(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        """GET `path`, or POST when there is a body; returns the answer's bytes."""
        request = urllib.request.Request(self.url + path, data=body, headers=headers or {})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", errors="replace")
            try:
                details = json.loads(text)
            except ValueError:
                details = {}
            raise ServerError(f"{path}: HTTP {error.code}: {text[:2000]}", details) from error

    def get(self, path: str) -> Any:
        """The JSON at `path`."""
        return json.loads(self.request(path))

    def post(self, path: str, data: Any) -> Any:
        """Send `data` as JSON; returns the JSON answer, None when it is empty."""
        answer = self.request(path, json.dumps(data).encode(), {"Content-Type": "application/json"})
        return json.loads(answer) if answer else None

    def object_info(self) -> dict[str, Any]:
        """ComfyUI's description of every node."""
        return dict(self.get("/object_info"))

    def view(self, image: dict[str, str]) -> bytes:
        """The file of one entry of a node's `images` output (PNG bytes)."""
        return self.request("/view?" + urllib.parse.urlencode(image))

    def upload(self, file: Path) -> str:
        """Copy an image into the server's input folder; returns the name LoadImage knows it by."""
        boundary = uuid.uuid4().hex
        head = (
            f"--{boundary}\r\n"
            f'Content-Disposition: form-data; name="image"; filename="{file.name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        return str(json.loads(self.request("/upload/image", body, headers))["name"])

    def interrupt(self) -> None:
        """Stop the running prompt."""
        self.post("/interrupt", {})

    # ---- prompts ----

    def queue(
        self, prompt: dict[str, Any], on_message: OnMessage | None = None, timeout: float = 600.0
    ) -> dict[str, Any]:
        """Run an API-format prompt to its end.

        Args:
            prompt: node id -> {"class_type", "inputs"}.
            on_message: called for each websocket message of this prompt, in order, as it arrives, in a
                thread of its own.
            timeout: seconds before giving up (the prompt is then interrupted).

        Returns:
            ComfyUI's history record: "outputs" by node id, "status" with "status_str" "success" or "error" (a
            node that failed does not raise here; see `failure`).

        Raises:
            ServerError: the prompt was refused (`details["node_errors"]`), or the time was up.
        """

        def follow() -> dict[str, Any]:
            return asyncio.run(self._queue(prompt, on_message or (lambda kind, data: None), timeout))

        # Ctrl-C reaches the main thread only. An event loop that it hits half built or half closed prints a
        # traceback; here it goes on until the server is gone.
        pool = ThreadPoolExecutor(1)
        following = pool.submit(follow)
        pool.shutdown(wait=False)
        while not wait([following], timeout=1).done:  # Windows lets nobody interrupt a wait without an end
            pass
        return following.result()

    def run(
        self, prompt: dict[str, Any], on_message: OnMessage | None = None, timeout: float = 600.0
    ) -> dict[str, Any]:
        """`queue`, but a failed prompt raises; returns the outputs by node id."""
        history = self.queue(prompt, on_message, timeout)
        if message := self.failure(history):
            raise ServerError(message, history)
        return dict(history["outputs"])

    @staticmethod
    def failure(history: dict[str, Any]) -> str:
        """What went wrong in a finished prompt, as the user reads it; empty when it succeeded."""
        if history["status"]["status_str"] == "success":
            return ""
        for kind, data in history["status"]["messages"]:
            if kind == "execution_error":
                return f"{data['node_type']} (node {data['node_id']}): {data['exception_message'].strip()}"
        return "interrupted"

    async def _queue(self, prompt: dict[str, Any], on_message: OnMessage, timeout: float) -> dict[str, Any]:
        import aiohttp  # ComfyUI brings it

        client = uuid.uuid4().hex
        address = f"{self.url}/ws?clientId={client}"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address, max_msg_size=0) as messages,
        ):
            posted = await asyncio.to_thread(self.post, "/prompt", {"prompt": prompt, "client_id": client})
            prompt_id = posted["prompt_id"]
            try:
                await asyncio.wait_for(self._follow(messages, prompt_id, on_message), timeout)
            except asyncio.TimeoutError:
                await asyncio.to_thread(self.interrupt)
                raise ServerError(f"The prompt was still running after {timeout:g} s.") from None
        return dict(self.get(f"/history/{prompt_id}")[prompt_id])

    async def _follow(self, messages: Any, prompt_id: str, on_message: OnMessage) -> None:
        """Pass on this prompt's messages until ComfyUI says that it executes nothing any more."""
        async for message in messages:
            if not isinstance(message.data, str):
                if text := _text_under_node(message.data):
                    on_message("progress_text", text)
                continue
            content = json.loads(message.data)
            kind, data = content["type"], content["data"]
            if data.get("prompt_id") != prompt_id:
                continue
            on_message(kind, data)
            if kind == "executing" and data["node"] is None:
                return
        raise ServerError(f"ComfyUI went away during the prompt. The end of its log:\n{self.log[-3000:]}")


def _text_under_node(data: bytes) -> dict[str, str] | None:
    """The node and the text of a binary message of that kind; None for others, such as preview pictures."""
    if data[:4] != TEXT:
        return None
    end = 8 + int.from_bytes(data[4:8], "big")
    return {"node": data[8:end].decode(), "text": data[end:].decode()}
