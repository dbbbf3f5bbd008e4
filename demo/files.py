"""Where the demo model's files lie in the repository."""

from __future__ import annotations

import argparse
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def teacher_file() -> Path:
    """The demo's U-Net with self-attention and the word embedding, fp16 safetensors."""
    return WEIGHTS / "teacher.safetensors"


def joint_file() -> Path:
    """The demo's NextDiT, whose attention joins text and image, with the same words, fp16 safetensors."""
    return WEIGHTS / "joint.safetensors"


def student_file() -> Path:
    """The ΔConvBlocks distilled from it, fp16 safetensors."""
    return WEIGHTS / "deltaconv.safetensors"


def classifier_file() -> Path:
    """The classifier whose features measure pictures, fp16 safetensors."""
    return WEIGHTS / "classifier.safetensors"


def named_file(text: str) -> tuple[str, Path]:
    """``NAME=FILE`` of a command line, for ``argparse``; the name becomes part of file names."""
    name, equals, file = text.partition("=")
    if not equals or not file or not name.strip() or set(name) & set('/\\:*?"<>|') or name.startswith("."):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, the NAME fit for a file's name, got {text!r}")
    return name, Path(file)
