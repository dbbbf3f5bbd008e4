"""Which ΔConvBlock is to learn which self-attention of a MODEL."""

from __future__ import annotations

from collections.abc import Iterable

from ....deltaconv_core.block.spec import BlockSpec
from ....deltaconv_core.sites import choose_specs
from .sites import Sites

AUTO, LEAN, FORMS = choose_specs.AUTO, choose_specs.LEAN, choose_specs.FORMS


def block_specs(
    found: Sites, chosen: Iterable[str], kernel_sizes: str, form: str = LEAN
) -> dict[str, BlockSpec]:
    """The specs of the blocks for the chosen sites of a MODEL; see `deltaconv_core.sites.choose_specs`.

    Raises:
        DeltaConvError: sizes that cannot be, or do not belong to this MODEL.
    """
    return choose_specs.block_specs(_shape(found), chosen, kernel_sizes, form)


def automatic(found: Sites) -> dict[str, BlockSpec]:
    """The specs of the blocks for all sites, if nothing else is wanted."""
    return choose_specs.automatic(_shape(found))


def _shape(found: Sites) -> choose_specs.ModelShape:
    ups = {int(name.split(".")[1]) for name in found.convolutions if name.startswith("up_blocks")}
    return choose_specs.ModelShape(found.architecture, found.channels, max(ups, default=-1) + 1)
