"""Where the demo model's files lie in the repository."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def teacher_file() -> Path:
    """The demo model with self-attention and its word embedding, fp16 safetensors."""
    return WEIGHTS / "teacher.safetensors"


def student_file() -> Path:
    """The ΔConvBlocks distilled from it, fp16 safetensors."""
    return WEIGHTS / "deltaconv.safetensors"
