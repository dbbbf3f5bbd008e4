"""Floating point operations, counted by PyTorch: two for each multiply-add."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn.attention import SDPBackend, sdpa_kernel


def count_flops(run: Callable[[], object]) -> int:
    """What matrix products and convolutions take in a run; pooling, gates and interpolation are left out.

    Attention is counted in its plain form, because the counter does not see every fused one. On tensors of
    the "meta" device nothing is computed, so any size can be counted.
    """
    # Here, because it imports triton, which takes longer than all else that a command needs.
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())
