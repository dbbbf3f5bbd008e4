"""The workflows in ComfyUI's own frontend, in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from scripts import workflow
from scripts.comfy_host import PACK_NAME, REPOSITORY
from scripts.comfy_server import ComfyServer

pytestmark = pytest.mark.browser

FILES = sorted(workflow.FOLDER.glob("*.json"))
# Chromium starts as root only without its sandbox; the rest keeps it from calling home.
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; $CHROMIUM names its program, else one is looked for on the path."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium; or set CHROMIUM)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        yield browser
        browser.close()


class Page:
    """ComfyUI's page, and what its console said."""

    def __init__(self, browser: Any, server: ComfyServer) -> None:
        self.complaints: list[str] = []
        server.post("/settings", {"Comfy.TutorialCompleted": True})  # no welcome dialog
        self.page = browser.new_page(viewport={"width": 1900, "height": 1150})
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)
        self.page.goto(server.url)
        self.page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=120_000)

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def open(self, saved: dict[str, Any]) -> None:
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", saved)
        self.page.wait_for_timeout(1500)

    def ours(self) -> list[str]:
        """Complaints that name this extension, but for the frontend's look-ups in the node registry."""
        return [
            text for text in self.complaints if "deltaconv" in text.lower() and "api.comfy.org" not in text
        ]


@pytest.fixture
def page(chromium, server_with_models) -> Iterator[Page]:
    opened = Page(chromium, server_with_models)
    yield opened
    opened.page.close()


@pytest.fixture
def keep_screenshot(request):
    """Saves a screenshot under output/screenshots, to be looked at."""
    folder = REPOSITORY / "output" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page: page.screenshot(path=folder / f"{request.node.callspec.id}.png")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_opens_whole_and_means_the_same(page, comfy_server, keep_screenshot, file):
    """No node is missing, nobody complains, and the frontend's prompt is the one of scripts/workflow.py."""
    saved = workflow.load(file)
    page.open(saved)
    keep_screenshot(page.page)
    shown = page.page.evaluate(
        "window.app.graph._nodes.map(node => [String(node.id), node.type in LiteGraph.registered_node_types])"
    )
    assert sorted(number for number, _ in shown) == sorted(str(node["id"]) for node in saved["nodes"])
    assert all(known for _, known in shown), [number for number, known in shown if not known]
    assert layout_faults(page.page) == []
    prompt = page.page.evaluate("async () => (await window.app.graphToPrompt()).output")
    info = comfy_server.object_info()
    for node in prompt.values():  # the frontend gives some of ComfyUI's nodes widgets of its own
        for name in set(node["inputs"]) - set(workflow.inputs_of(info[node["class_type"]])):
            del node["inputs"][name]
    assert prompt_inputs(prompt) == prompt_inputs(workflow.to_prompt(saved, info))
    assert page.ours() == []


def layout_faults(page: Any) -> list[str]:
    """Nodes on each other or outside every group (notes need none), and links that lead back to the left."""
    nodes = page.evaluate(
        "window.app.graph._nodes.map(({id, type, pos, size}) => ({id, type, box:"
        " [pos[0], pos[1] - LiteGraph.NODE_TITLE_HEIGHT, pos[0] + size[0], pos[1] + size[1]]}))"
    )
    groups = page.evaluate(
        "window.app.graph._groups.map(({pos, size}) => [...pos, pos[0] + size[0], pos[1] + size[1]])"
    )
    links = page.evaluate("window.app.graph.serialize().links.map(link => [link[1], link[3]].map(String))")
    boxes = {str(node["id"]): node["box"] for node in nodes}
    faults = [f"{a} lies on {b}" for a, b in combinations(boxes, 2) if overlap(boxes[a], boxes[b])]
    faults += [
        f"{node['id']} is in no group"
        for node in nodes
        if node["type"] not in workflow.NOTES and not any(inside(node["box"], group) for group in groups)
    ]
    return faults + [f"from {a} back to {b}" for a, b in links if boxes[b][0] < boxes[a][0]]


def overlap(a: list[float], b: list[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(a: list[float], b: list[float]) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]


def prompt_inputs(prompt: dict[str, Any]) -> dict[str, Any]:
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


def test_a_missing_node_would_be_noticed(page):
    saved = workflow.load(FILES[0])
    saved["nodes"][1]["type"] = "DeltaConvNotThere"
    page.open(saved)
    assert not page.page.evaluate("'DeltaConvNotThere' in LiteGraph.registered_node_types")
    assert page.page.get_by_text("DeltaConvNotThere").count() > 0


def test_the_template_list_shows_the_workflows(page):
    listed = page.page.evaluate("async () => await (await fetch('/api/workflow_templates')).json()")
    assert set(listed[PACK_NAME]) == {file.stem for file in FILES}


@pytest.mark.slow
def test_runs_from_the_browser(page):
    """The Run button's command; both Save Image nodes show their pictures."""
    page.open(workflow.load(workflow.FOLDER / "1_start_here.json"))
    page.page.evaluate("window.app.queuePrompt(0)")
    page.page.wait_for_function(
        "window.app.graph._nodes.filter(node => node.type === 'SaveImage')"
        ".every(node => node.imgs?.length === 4)",
        timeout=300_000,
    )
    page.page.wait_for_timeout(1000)
    assert page.ours() == []
