"""The folder of a run: the state to go on from, the result as it is so far, and the options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...block.spec import BlockSpec
from ...distill import Row, RunFolder
from ...distill.run_folder import State
from ...weights.checkpoint import Checkpoint, assemble_blocks, save_checkpoint

RESULT, OPTIONS = "deltaconv.safetensors", "config.json"


class Output(RunFolder):
    """A run folder that also has the averaged weights of the last save, as a checkpoint, and the options.

    Args:
        path: of the folder.
        writes: whether this process writes.
        architecture: of the teacher.
        specs: of the blocks, by site id.
        metadata: of the checkpoint.
        options: text of a file for `--config`; written with the first save, when nothing was refused.
    """

    def __init__(
        self,
        path: Path,
        writes: bool,
        architecture: str,
        specs: Mapping[str, BlockSpec],
        metadata: Mapping[str, str],
        options: str,
    ) -> None:
        super().__init__(path, writes)
        self.architecture = architecture
        self.specs = specs
        self.metadata = metadata
        self.options = options

    @property
    def result(self) -> Path:
        """The checkpoint's file."""
        return self.path / RESULT

    def save(self, state: State, rows: list[Row]) -> None:
        """Writes the state, and what goes with it."""
        super().save(state, rows)
        if self.writes:
            (self.path / OPTIONS).write_text(self.options, encoding="utf-8")
            weights = _part(state.tensors, "average.") or _part(state.tensors, "weights.")
            blocks = assemble_blocks(
                str(self.result), self.specs, {name: w.detach().clone() for name, w in weights.items()}
            )
            metadata = {**self.metadata, "steps": str(state.step)}
            save_checkpoint(Checkpoint(self.architecture, blocks, {}, metadata), self.result)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}
