"""All launches of one block, done again with other addresses: what is between them in Python is left out.

Once every kernel of a block has been launched directly, a tape says for each launch in what its tensors lie:
in one of the block's inputs, in the result, or in memory that the block needs in between. The last is then
one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .launch import ALIGNED, Recorded, launches_watched

APART = 256  # bytes: how pieces of memory are aligned, as PyTorch's allocators do
WORK, RESULT = 0, 1  # in what a tensor lies: the memory in between, the result; above that, the inputs

Place = tuple[int, int]  # what a tensor lies in, and how many bytes after its beginning


class Tape:
    """See the head of this file.

    Args:
        launches: each with the places of its tensors.
        size: bytes of the memory in between.
    """

    def __init__(self, launches: list[tuple[Callable[[list[int]], None], list[Place]]], size: int) -> None:
        self.launches, self.size = launches, size

    def played(self, inputs: Sequence[Tensor], shape: torch.Size) -> Tensor | None:
        """The result for inputs like those recorded, in the dtype of the first; None if they cannot be used.

        They must have the same shapes and dtypes and be contiguous.
        """
        work = inputs[0].new_empty(self.size, dtype=torch.uint8)
        result = inputs[0].new_empty(shape)
        bases = [tensor.data_ptr() for tensor in (work, result, *inputs)]
        bits = 0
        for base in bases:
            bits |= base
        if bits % ALIGNED or launches_watched():
            return None
        for direct, places in self.launches:
            direct([bases[i] + offset for i, offset in places])
        return result


def taped(recorded: Sequence[Recorded], inputs: Sequence[Tensor], result: Tensor) -> Tape | None:
    """A tape of what was recorded; None if that cannot be done again.

    Args:
        inputs: contiguous; tensors that the launches did not make.
        result: what the last of them wrote. The last tensor of each launch is the one that it writes.
    """
    known = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (result, *inputs)]
    in_order = sorted(known)
    apart = all(end <= start for (_, end), (start, _) in pairwise(in_order))
    if not recorded or not apart or any(start % ALIGNED for start, _ in known):
        return None
    size, launches = 0, []
    begins: dict[int, int] = {}  # address of memory in between -> where it lies on the tape
    for direct, tensors in recorded:
        if direct is None:
            return None
        places: list[Place] = []
        written = tensors[-1].untyped_storage()
        for tensor in tensors:
            address, storage = tensor.data_ptr(), tensor.untyped_storage()
            inside = [i for i, (start, end) in enumerate(known) if start <= address < end]
            if inside:
                places.append((RESULT + inside[0], address - known[inside[0]][0]))
                continue
            begin = storage.data_ptr()
            if begin not in begins:
                if begin != written.data_ptr():
                    return None  # something else wrote it
                begins[begin] = size
                size += -(-storage.nbytes() // APART) * APART
            places.append((WORK, begins[begin] + address - begin))
        launches.append((direct, places))
    return Tape(launches, size)
