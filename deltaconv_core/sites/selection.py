"""The language in which a user says which sites are meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ..errors import DeltaConvError
from ..util.text import listing

GROUPS = {"down": "down_blocks.*", "mid": "mid_block.*", "up": "up_blocks.*"}
SHOWN_SITES = 16  # site ids in a message


def select(pattern: str, site_ids: Iterable[str]) -> tuple[str, ...]:
    """The sites that a block selection names.

    Args:
        pattern: comma list of "all", "down", "mid", "up", site ids, their beginnings up to a dot, globs of
            either (`up_blocks.*`, `*.transformer_blocks.0`). A leading "-" excludes; exclusions alone start
            from all.
        site_ids: the ids to choose from.

    Returns:
        The chosen ids in the order given.

    Raises:
        DeltaConvError: a part that matches no id, or a selection of nothing.
    """
    ids = tuple(site_ids)
    parts = [part.strip() for part in pattern.split(",") if part.strip()]
    wanted = [part for part in parts if not part.startswith("-")]
    unwanted = [part[1:].strip() for part in parts if part.startswith("-")]
    chosen = _matches(wanted, ids) if wanted or not unwanted else set(ids)
    chosen -= _matches(unwanted, ids)
    if not chosen:
        raise DeltaConvError(
            f"the block selection {pattern!r} selects nothing; use 'all' or some of: "
            f"{listing(ids, SHOWN_SITES)}"
        )
    return tuple(site for site in ids if site in chosen)


def _matches(parts: Iterable[str], ids: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    for part in parts:
        glob = "*" if part == "all" else GROUPS.get(part, part)
        hits = {site for site in ids if fnmatchcase(site, glob) or fnmatchcase(site, f"{glob}.*")}
        if not hits:
            raise DeltaConvError(
                f"the block selection {part!r} matches no site{_nearest(part, ids)}; use all, down, mid, "
                f"up or: {listing(ids, SHOWN_SITES)}"
            )
        found |= hits
    return found


def _nearest(part: str, ids: tuple[str, ...]) -> str:
    """A question after what was probably meant; nothing where it is like nothing."""
    beginnings = {id[: dot.start()] for id in ids for dot in re.finditer(r"\.", id)}
    near = get_close_matches(part, ["all", *GROUPS, *sorted(beginnings), *ids], n=1)
    return f", did you mean {near[0]!r}?" if near else ""
