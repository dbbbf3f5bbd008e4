"""What torch.compile is to know of our functions, said without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_result(function: F) -> F:
    """Decorates a function that torch.compile calls once, while it traces, and whose answer it keeps.

    `torch.compiler.assume_constant_result` sets the same attribute, and imports `torch._dynamo` to do so:
    about a second and hundreds of modules, also in programs that never compile anything.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
