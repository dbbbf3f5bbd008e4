"""Telling the user: in the log, under the node, and in the node's outputs."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ...deltaconv_core.sites.report import Report
from ...deltaconv_core.util.text import listing

log = logging.getLogger(__name__)


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
    return report.text


def left_out(unseen: list[str]) -> list[str]:
    """The warning about self-attentions that were never called in the usual way; nothing without any."""
    if not unseen:
        return []
    what = f"{len(unseen)} self-attentions were not called in the usual way and are left out"
    return [f"{what}: {listing(unseen)}"]


def show(text: str, hidden: io.HiddenHolder | None) -> None:
    """Shows a text under the node, in place of what was there; `hidden` as in `tell`."""
    if hidden is None or hidden.unique_id is None:
        return
    from server import PromptServer  # only a running server has it loaded

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, hidden.unique_id)
