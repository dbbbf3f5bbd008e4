"""Errors whose message is meant for the person who runs the program: what was wrong, and what to do."""

from __future__ import annotations

from .util.text import shortened

LONGEST_MESSAGE = 2000
"""Characters of a message: what it quotes may be a file's, and of any length."""


class DeltaConvError(ValueError):
    """Anything the user can put right; every error raised on purpose by this package derives from it."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(str(message), LONGEST_MESSAGE))


class CheckpointError(DeltaConvError):
    """A checkpoint file that is damaged, foreign, or does not fit."""


class ManifestError(DeltaConvError):
    """A weights manifest with a record that cannot be used."""


class FetchError(DeltaConvError):
    """A download that failed or did not match its record."""


for _error in (DeltaConvError, CheckpointError, ManifestError, FetchError):
    # ComfyUI shows the whole name to the user, and loads this package under that of a path.
    _error.__module__ = "deltaconv_core"
