"""Telling the user: in the log, under the node, and in the node's outputs."""

from __future__ import annotations

import json
import logging
import sys
from collections import OrderedDict
from typing import Any

from comfy_api.latest import io

from ...deltaconv_core.sites.report import Report
from ...deltaconv_core.util.text import listing

KEPT = 200  # texts of earlier runs

log = logging.getLogger(__name__)
_said: OrderedDict[str, str] = OrderedDict()
"""What nodes said, by what led to it."""


class TellsAgain(io.ComfyNode):
    """A node whose text also stands under it when ComfyUI has its answer cached.

    ComfyUI does not run such a node, and sends a node's text only while it runs. So a page that was loaded
    again would show none, and after a setting was changed and changed back, it would show the other's. But
    ComfyUI asks every node of a prompt for a fingerprint before it decides what has to run.
    """

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        tell_again()
        return None


def tell(report: Report, hidden: io.HiddenHolder | None) -> str:
    """Logs the report and shows it under the node; returns its text for the node's outputs.

    Args:
        report: what to say.
        hidden: the node's hidden inputs; None when it was not called by ComfyUI's executor.
    """
    log.info("%s", " ".join([*report.lines, *report.details]))
    for warning in report.warnings:
        log.warning("ΔConv: %s", warning)
    show(report.text, hidden)
    server = _server()
    if hidden is not None and hidden.unique_id is not None and (running := _running(server)):
        _said[_origin(running[2], hidden.unique_id)] = report.text
        while len(_said) > KEPT:
            _said.popitem(last=False)
    return report.text


def tell_again() -> None:
    """Shows under each node of the running prompt what it said when it last ran with the same inputs."""
    server = _server()
    if running := _running(server):
        for id in running[2]:
            if (text := _said.get(_origin(running[2], id))) is not None:
                server.send_progress_text(text, id)


def left_out(unseen: list[str]) -> list[str]:
    """The warning about self-attentions that were never called in the usual way; nothing without any."""
    if not unseen:
        return []
    what = f"{len(unseen)} self-attentions were not called in the usual way and are left out"
    return [f"{what}: {listing(unseen)}"]


def show(text: str, hidden: io.HiddenHolder | None) -> None:
    """Shows a text under the node, in place of what was there; `hidden` as in `tell`."""
    server = _server()
    if hidden is not None and hidden.unique_id is not None and server is not None:
        server.send_progress_text(text, hidden.unique_id)


def _server() -> Any:
    """ComfyUI's server, if one runs."""
    module = sys.modules.get("server")  # only a running server has it loaded
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def _running(server: Any) -> Any:
    """The prompt that runs now, as ComfyUI's queue holds it: (number, id, nodes by their ids, ...)."""
    running = server.prompt_queue.get_current_queue_volatile()[0] if server is not None else []
    return running[0] if running else None


def _origin(prompt: dict[str, Any], id: str) -> str:
    """A node of a prompt and all nodes before it, as text."""
    part, waiting = {}, [id]
    while waiting:
        id = waiting.pop()
        if id in prompt and id not in part:
            node = prompt[id]
            part[id] = [node["class_type"], node["inputs"]]
            waiting += [value[0] for value in node["inputs"].values() if isinstance(value, list) and value]
    return json.dumps(part, sort_keys=True)
