"""Names of files that every system takes."""

from __future__ import annotations

import re

LONGEST_NAME = 200
"""Bytes. File systems take 255, and numbers, endings and the names of unfinished files need some."""
FORBIDDEN = '<>:"|?*\\'
# Windows opens a device, not a file, for these names, whatever the extension.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)


def is_device(name: str) -> bool:
    """Whether Windows takes a file's name for a device."""
    return _DEVICE.fullmatch(name) is not None


def why_not(name: str) -> str:
    """What keeps a text from being the name of a file or folder; empty if nothing does."""
    if not name or name != name.strip():
        return "a name may not be empty, and not begin or end with a space"
    if name.startswith(".") or name.endswith("."):
        return "a name may not begin or end with a dot"
    if bad := sorted({c for c in name if c in FORBIDDEN or not c.isprintable()}):
        return f"a name may not hold {' '.join(c if c.isprintable() else ascii(c) for c in bad)}"
    if is_device(name):
        return "Windows takes this name for a device"
    if len(name.encode()) > LONGEST_NAME:
        return f"a name may have {LONGEST_NAME} bytes, and this one has {len(name.encode())}"
    return ""
