"""The device that the demo's networks run on: ``--device`` of its commands."""

from __future__ import annotations

from argparse import ArgumentParser

from scripts import comfy_host


def add_device(parser: ArgumentParser) -> None:
    """The option ``--device``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")


def use_device(name: str) -> None:
    """Have ComfyUI run on the device; to be called before ComfyUI is imported."""
    comfy_host.ARGUMENTS["cpu"] = name == "cpu"
