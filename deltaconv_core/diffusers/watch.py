"""Being told of the queries, keys and values of a diffusers model's self-attention while the model runs.

Forward pre-hooks see what goes into the modules and change nothing; afterwards they are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .projections import queries_keys_values
from .sites import Sites, Stack

See = Callable[[str, Tensor, Tensor, Tensor, tuple[int, int], Tensor | None], None]
"""Is told (site id, q, k, v (B, heads, N, d), grid, attention_mask or None) of a call."""


@contextmanager
def watched(
    found: Sites, sites: Iterable[str], see: See, wanted: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Inside, `see` is told of every call of the chosen attentions, before they answer.

    Args:
        found: the sites of the model.
        sites: ids of those that are looked at.
        see: what is told.
        wanted: asked before each call's projections are made; False: `see` is not told of it.
    """
    watch = _Watch(see, wanted)
    with ExitStack() as hooks:

        def put(module: nn.Module, hook: Any) -> None:
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)

        for stack in found.stacks:
            put(stack.module, watch.of_stack(stack))
        for id in sites:
            put(found.attentions[id], watch.of_attention(id))
        yield


class _Watch:
    """The hooks, and what they know of the running call."""

    def __init__(self, see: See, wanted: Callable[[], bool]) -> None:
        self.see, self.wanted = see, wanted
        self.grid = (0, 0)

    def of_stack(self, stack: Stack) -> Any:
        """Transformer2DModel and PixArtTransformer2DModel take (B, C, H, W) as their first argument."""

        def hook(module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> None:
            states: Tensor = args[0] if args else call["hidden_states"]
            self.grid = (states.shape[-2] // stack.patch_size, states.shape[-1] // stack.patch_size)

        return hook

    def of_attention(self, id: str) -> Any:
        def hook(attention: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> None:
            if self.wanted():
                x: Tensor = args[0] if args else call["hidden_states"]
                self.see(id, *queries_keys_values(attention, x), self.grid, call.get("attention_mask"))

        return hook
