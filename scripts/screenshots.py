"""Pictures of the templates and of the nodes as users see them, after *Run* in a real ComfyUI and a browser.

    python -m scripts.screenshots [--style classic|vue] [--output FOLDER] [--help-pages] [TEMPLATE ...]

Opens the templates that need no model of the user's, presses *Run*, and takes the page. With --help-pages
it takes our nodes in them instead, for the pictures of their help pages, `web/docs/<node>/picture.webp`.
Needs Chromium, and some minutes; COMFYUI_PATH names another ComfyUI.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import Any

from PIL import Image

from . import workflow
from .comfy_host import REPOSITORY, find_host, version
from .comfy_page import STYLES, Page, chromium, chromium_program
from .comfy_server import ComfyServer

HELP = REPOSITORY / "web" / "docs"
WALK = REPOSITORY / "docs" / "first_hour"
PANEL = 282  # pixels of the narrowest help panel
LONGEST = 1200  # seconds of a template
# No template that runs without a model of the user's has these two, so they are put into this one.
START = "1_start_here"
ADD_NODES = """weights => {
    const joint = window.LiteGraph.createNode("DeltaConvJointDemoModel")
    joint.pos = [-400, 600]
    joint.size = [330, 58]  // for its title
    window.app.graph.add(joint)
    const node = window.LiteGraph.createNode("DeltaConvLoadWeights")
    window.app.graph.add(node)
    node.pos = [-400, 800]
    node.widgets.find(widget => widget.name === "weights").value = weights
    const patch = window.app.graph._nodes.find(other => other.type === "DeltaConvPatchModel")
    node.connect(0, patch, patch.inputs.findIndex(input => input.name === "deltaconv"))
}"""
OURS = """window.app.graph._nodes.filter(node => node.type.startsWith("DeltaConv"))
    .map(node => [String(node.id), node.type, node.pos[0], node.pos[1]])"""
LOOK_AT = """([x, y]) => {
    const view = window.app.canvas.ds
    view.scale = 1
    view.offset = [300 - x, 160 - y]
    window.app.canvas.setDirty(true, true)
}"""


def run(page: Page) -> None:
    """Presses *Run* and waits for the end.

    Raises:
        TimeoutError: it took too long.
    """
    page.page.evaluate("window.app.queuePrompt(0)")
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        page.page.wait_for_timeout(1500)
        queue = page.page.evaluate("async () => await (await fetch('/api/queue')).json()")
        if not queue["queue_running"] and not queue["queue_pending"]:
            page.page.wait_for_timeout(2500)  # for the last pictures
            return
    raise TimeoutError(f"the template was still running after {LONGEST} s")


def save(shot: bytes, path: Path, width: int | None = None) -> None:
    """Saves a screenshot, at most so many pixels wide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(shot)) as picture:
        if width is not None and picture.width > width:
            size = (width, round(picture.height * width / picture.width))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        picture.convert("RGB").save(path, quality=82, method=6)


def take_page(browser: Any, server: ComfyServer, name: str, style: str, folder: Path) -> None:
    """A template after its run."""
    page = Page(browser, server, style)
    page.open(workflow.load(workflow.FOLDER / f"{name}.json"))
    run(page)
    save(page.page.screenshot(), folder / f"{name}_{style}_{version(find_host())}.webp")
    page.page.close()


def take_nodes(browser: Any, server: ComfyServer, name: str, done: set[str]) -> None:
    """Our nodes in a template that were in none before, after its run, twice as large as the panel is."""
    page = Page(browser, server, "vue", device_scale_factor=2)
    page.page.set_viewport_size({"width": 1440, "height": 2000})  # for the highest node
    page.open(workflow.load(workflow.FOLDER / f"{name}.json"))
    if name == START:
        choices = server.object_info()["DeltaConvLoadWeights"]["input"]["required"]["weights"]
        names = choices[0] if isinstance(choices[0], list) else choices[1]["options"]
        page.page.evaluate(ADD_NODES, next(one for one in names if "demo" in one))
    run(page)
    for id, kind, x, y in page.page.evaluate(OURS):
        if kind not in done:
            done.add(kind)
            page.page.evaluate(LOOK_AT, [x, y])
            page.page.wait_for_timeout(700)
            shot = page.page.locator(f'[data-node-id="{id}"]').first.screenshot()
            save(shot, HELP / kind / "picture.webp", 2 * PANEL)
    page.page.close()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    options.add_argument("templates", nargs="*", help="their names; default: all that need no model")
    options.add_argument("--style", choices=STYLES, default="classic", help="of the nodes")
    options.add_argument("--output", type=Path, default=WALK, help="where the pages go")
    options.add_argument("--help-pages", action="store_true", help="our nodes instead of pages")
    given = options.parse_args()
    program = chromium_program()
    if program is None:
        raise SystemExit("this needs Chromium: install it, or set CHROMIUM to its program")
    done: set[str] = set()
    with ComfyServer() as server, chromium(program) as browser:
        for name in given.templates or sorted(file.stem for file in workflow.FOLDER.glob("[0-9]*.json")):
            if given.help_pages:
                take_nodes(browser, server, name, done)
            else:
                take_page(browser, server, name, given.style, given.output)


if __name__ == "__main__":
    main()
