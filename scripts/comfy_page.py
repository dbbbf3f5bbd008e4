"""ComfyUI's page in a browser without a window."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .comfy_server import ComfyServer

STYLES = ("classic", "vue")  # the two kinds of nodes that ComfyUI draws
# Chromium starts as root only without its sandbox; the rest keeps it from calling home.
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
SHOWN = """JSON.stringify([...document.querySelectorAll("[data-node-id]")].map(
    shown => shown.getBoundingClientRect()))"""


def chromium_program() -> str | None:
    """A browser's program: $CHROMIUM, or one on the path."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def chromium(program: str) -> Iterator[Any]:
    """A running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        yield browser
        browser.close()


class Page:
    """ComfyUI's page, and what its console said.

    Args:
        browser: from `chromium`.
        server: whose page.
        style: of `STYLES`.
        more: for the browser's page, such as its `device_scale_factor`.
    """

    def __init__(self, browser: Any, server: ComfyServer, style: str, **more: Any) -> None:
        self.complaints: list[str] = []
        self.vue = style == "vue"
        # The first is against the welcome dialog.
        server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": self.vue})
        self.page = browser.new_page(viewport={"width": 1440, "height": 900}, **more)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)
        self.page.goto(server.url)
        self.page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=120_000)

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def open(self, saved: dict[str, Any]) -> None:
        """Opens a workflow, and waits until its nodes stand still."""
        self.complaints.clear()
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", saved)
        self.page.wait_for_timeout(1500)
        before = None
        for _ in range(20):  # a slow machine lays Vue nodes out later
            now = self.page.evaluate(SHOWN)
            if now == before:
                break
            before = now
            self.page.wait_for_timeout(500)

    def ours(self) -> list[str]:
        """Complaints that name this extension, but for the frontend's look-ups in the node registry."""
        return [
            text for text in self.complaints if "deltaconv" in text.lower() and "api.comfy.org" not in text
        ]
