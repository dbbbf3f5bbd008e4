"""The workflows in ComfyUI's own frontend, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from scripts import comfy_page, workflow
from scripts.comfy_host import PACK_NAME, REPOSITORY
from scripts.comfy_page import Page

pytestmark = pytest.mark.browser

FILES = sorted(workflow.FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; $CHROMIUM names its program, else one is looked for on the path."""
    program = comfy_page.chromium_program()
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium; or set CHROMIUM)")
    with comfy_page.chromium(program) as browser:
        yield browser


@pytest.fixture(scope="module", params=comfy_page.STYLES)
def page(request, chromium, server_with_models) -> Iterator[Page]:
    """One page for all templates, with one of the two kinds of nodes that ComfyUI draws."""
    opened = Page(chromium, server_with_models, request.param)
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
    assert layout_faults(page) == []
    prompt = page.page.evaluate("async () => (await window.app.graphToPrompt()).output")
    info = comfy_server.object_info()
    for node in prompt.values():  # the frontend gives some of ComfyUI's nodes widgets of its own
        for name in set(node["inputs"]) - set(workflow.inputs_of(info[node["class_type"]])):
            del node["inputs"][name]
    assert prompt_inputs(prompt) == prompt_inputs(workflow.to_prompt(saved, info))
    assert page.ours() == []


SMALLEST_ZOOM = 0.6  # at which everything can be read on a screen of 1440 × 900
CLASSIC = """window.app.graph._nodes.map(({id, type, pos, size}) => ({id, type, box:
    [pos[0], pos[1] - LiteGraph.NODE_TITLE_HEIGHT, pos[0] + size[0], pos[1] + size[1]]}))"""
VUE = """window.app.graph._nodes.map(({id, type}) => {
    const shown = document.querySelector(`[data-node-id="${id}"]`)
    const {left, top, right, bottom} = shown.getBoundingClientRect()
    return {id, type, box: [left, top, right, bottom].map(length => length / window.app.canvas.ds.scale)}
})"""


def layout_faults(page: Page) -> list[str]:
    """What is wrong once nodes have their places: the frontend moves Vue nodes a few frames after opening."""
    for _ in range(12):
        faults = faults_now(page)
        if not faults:
            break
        page.page.wait_for_timeout(250)
    return faults


def faults_now(page: Page) -> list[str]:
    """Too small to read; nodes on each other; links that lead back to the left.

    In classic nodes, too: text that is not drawn, groups on each other, and nodes outside every group (notes
    need none). ComfyUI 0.3.75 moves Vue nodes and leaves groups where they were.
    """
    nodes = page.page.evaluate(VUE if page.vue else CLASSIC)
    links = page.page.evaluate(
        "window.app.graph.serialize().links.map(link => [link[1], link[3]].map(String))"
    )
    boxes = {str(node["id"]): node["box"] for node in nodes}
    faults = [f"{a} lies on {b}" for a, b in combinations(boxes, 2) if overlap(boxes[a], boxes[b])]
    faults += [f"from {a} back to {b}" for a, b in links if boxes[b][0] < boxes[a][0] - 1]
    zoom = page.page.evaluate("window.app.canvas.ds.scale")
    if zoom < SMALLEST_ZOOM:
        faults.append(f"opens at {zoom:.2f}")
    if not page.vue:
        groups = page.page.evaluate(
            "window.app.graph._groups.map(({pos, size}) => [...pos, pos[0] + size[0], pos[1] + size[1]])"
        )
        faults += [
            f"{node['id']} is in no group"
            for node in nodes
            if node["type"] not in workflow.NOTES and not any(inside(node["box"], group) for group in groups)
        ]
        faults += [f"groups {a} and {b} overlap" for a, b in combinations(groups, 2) if overlap(a, b)]
        if page.page.evaluate("window.app.canvas.low_quality"):
            faults.append("no text is drawn")
    return faults


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda nodes: nodes[2].update(pos=nodes[1]["pos"]), "lies on"),
        (lambda nodes: nodes[0].update(pos=[-900, 30]), "opens at"),
    ],
)
def test_a_fault_of_the_layout_would_be_noticed(page, change, fault):
    saved = workflow.load(workflow.FOLDER / "1_start_here.json")
    change(saved["nodes"])
    page.open(saved)
    assert any(fault in found for found in layout_faults(page))


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


TEXT = """window.app.graph._nodes.find(node => node.type === "DeltaConvPatchModel").widgets
    .find(widget => widget.name === "$$node-text-preview")?.value"""


@pytest.mark.slow
def test_runs_from_the_browser(page):
    """The Run button's command; ΔConv Compare shows its sheet, and ΔConv Patch Model its text.

    So they do on a page where ComfyUI has both from before.
    """
    for _ in range(2):
        page.open(workflow.load(workflow.FOLDER / "1_start_here.json"))
        assert page.page.evaluate(TEXT) is None
        page.page.evaluate("window.app.queuePrompt(0)")
        page.page.wait_for_function(
            "Object.values(window.app.nodeOutputs).some(output => output.images?.length === 1)",
            timeout=300_000,
        )
        page.page.wait_for_timeout(1000)
        assert "ΔConv stands in for" in page.page.evaluate(TEXT)
        assert page.ours() == []
