"""Which ΔConvBlock is to learn which self-attention of a MODEL."""

from __future__ import annotations

from collections.abc import Iterable

from ...deltaconv_core import kernel_sizes as core
from ...deltaconv_core.spec import BlockSpec
from .sites import Sites

AUTO, LEAN, FORMS = core.AUTO, core.LEAN, core.FORMS


def block_specs(
    found: Sites, chosen: Iterable[str], kernel_sizes: str, form: str = LEAN
) -> dict[str, BlockSpec]:
    """The specs of the blocks for the chosen sites of a MODEL; see `deltaconv_core.kernel_sizes`.

    Raises:
        DeltaConvError: sizes that cannot be, or do not belong to this MODEL.
    """
    return core.block_specs(_shape(found), chosen, kernel_sizes, form)


def automatic(found: Sites) -> dict[str, BlockSpec]:
    """The specs of the blocks for all sites, if nothing else is wanted."""
    return core.automatic(_shape(found))


def _shape(found: Sites) -> core.Shape:
    ups = {int(name.split(".")[1]) for name in found.convolutions if name.startswith("up_blocks")}
    return core.Shape(found.architecture, found.channels, max(ups, default=-1) + 1)
