"""What a run of `distill` writes beside its state: the result as it is so far, and the options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...block.spec import BlockSpec
from ...distill.run_folder import State
from ...weights.checkpoint import Checkpoint, assemble_blocks, save_checkpoint

RESULT_FILE, OPTIONS_FILE = "deltaconv.safetensors", "config.json"


def write_result(
    folder: Path,
    architecture: str,
    specs: Mapping[str, BlockSpec],
    metadata: Mapping[str, str],
    state: State,
) -> None:
    """Writes the blocks of a saved state as a checkpoint.

    Args:
        folder: of the run.
        architecture: of the teacher.
        specs: of the blocks, by site id.
        metadata: of the checkpoint.
        state: as it was saved.
    """
    result = folder / RESULT_FILE
    blocks = assemble_blocks(str(result), specs, state.learned)
    save_checkpoint(Checkpoint(architecture, blocks, {}, {**metadata, "steps": str(state.step)}), result)
