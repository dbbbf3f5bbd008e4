"""Joint mixers in transformers of diffusers: FLUX.1 and 2, Chroma, SD 3, Lumina 2, Z-Image and Qwen-Image.

A mixer answers PyTorch's `scaled_dot_product_attention` where an attention's own processor calls it: so
projections, LoRA, rotary embeddings, IP-Adapters and ControlNets stay as they are. Where the image is among
the tokens comes from what the pipeline hands to the model. Another attention backend than PyTorch's hides
that call; then attention runs, and the log says so.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..distill.hybrid import SeeCall
from ..distill.replaced import replaced
from ..mixers.joint import JointLayout
from ..mixers.joint.module import attention
from ..mixers.joint.place import refusal_of_mask
from ..mixers.joint.plan import Plan
from ..util.text import listing
from .applied import AppliedBlocks

Z_IMAGE_MULTIPLE = 32  # tokens that image and text are filled up to, each

log = logging.getLogger(__name__)


@dataclass
class JointCall:
    """One call of the model.

    Args:
        layouts: number of an attention's queries -> where the image is among them.
        why_not: why that is not known.
    """

    layouts: dict[int, JointLayout] = field(default_factory=dict)
    why_not: str | None = None


@dataclass
class JointModel:
    """The joint attentions of a model.

    Args:
        architecture: its family, named as in ComfyUI.
        attentions: site id -> the attention.
        read: (arguments of the model's forward) -> what its call is.
        plan: which of mixer and attention is faster.
        said: what was logged already, or its kind.
        call: the running one.
    """

    architecture: str
    attentions: dict[str, Any]
    read: Callable[[dict[str, Any]], JointCall]
    plan: Plan = field(default_factory=Plan)
    said: set[str] = field(default_factory=set)
    call: JointCall | None = None

    @property
    def channels(self) -> dict[str, int]:
        """Site id -> width of its queries, keys and values."""
        return {site: int(one.inner_dim) for site, one in self.attentions.items()}

    @property
    def heads(self) -> dict[str, int]:
        """Site id -> heads of its queries."""
        return {site: int(one.heads) for site, one in self.attentions.items()}

    def tell(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the model."""
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
        self.call = self.read(given.arguments)

    def say(self, sentence: str, level: int = logging.INFO, kind: str = "") -> None:
        """Logs it once, or the first of a kind."""
        if (kind or sentence) not in self.said:
            self.said.add(kind or sentence)
            log.log(level, "ΔConv: %s", sentence)


def find_joint(model: nn.Module) -> JointModel | None:
    """The joint attentions of a model; None for one of another family."""
    reader = JOINT_FAMILIES.get(type(model).__name__)
    return None if reader is None else reader(model)


class JointForward(ABC):
    """The `forward` of an attention whose question to PyTorch's attention is listened to.

    Args:
        site: its id.
        found: the joint attentions of the model.
        original: the forward that was there.
    """

    def __init__(self, site: str, found: JointModel, original: Any) -> None:
        self.site, self.found, self.original = site, found, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = _Answering(self)
        with mode:
            y = self.original(*args, **kwargs)
        if not mode.met:
            self.found.say(
                f"the attention backend at {self.site} is not PyTorch's own, so joint mixers do not run "
                "there, nor wherever else that is so; set_attention_backend('native') lets them",
                logging.WARNING,
                "backend",
            )
        return y

    def hear(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """An answer to what PyTorch's attention is asked; None: attention as usual."""
        call = self.found.call
        plain = not dropout_p and not is_causal and scale in (None, query.shape[-1] ** -0.5)
        if call is None or not plain:
            return None
        layout = call.layouts.get(query.shape[2])
        if not call.why_not and (layout is None or key.shape[2] < query.shape[2]):
            return None  # a second attention beside it, as an IP-Adapter has
        why = call.why_not or (layout and refusal_of_mask(attn_mask, layout))
        if why or layout is None:
            self.found.say(f"attention stays where joint mixers could be, since {why}", logging.WARNING)
            return None
        return self.answer(query, key, value, layout, attn_mask)

    @abstractmethod
    def answer(
        self, q: Tensor, k: Tensor, v: Tensor, layout: JointLayout, mask: Tensor | None
    ) -> Tensor | None:
        """To a question with an image in it; None: attention as usual."""


class JointMixerForward(JointForward):
    """The `forward` of an attention with a joint mixer in it.

    Args:
        site, found, original: as of `JointForward`.
        blocks: all that is on the model.
    """

    def __init__(self, site: str, blocks: AppliedBlocks, found: JointModel, original: Any) -> None:
        super().__init__(site, found, original)
        self.blocks = blocks

    def answer(
        self, q: Tensor, k: Tensor, v: Tensor, layout: JointLayout, mask: Tensor | None
    ) -> Tensor | None:
        mixer, found = self.blocks.blocks[self.site], self.found
        verdict = found.plan.verdict(mixer, q, k, v, layout, mask, attention)
        what = "mixers run" if verdict.mixer else "attention stays"
        found.say(f"images of {layout.grid[0]} x {layout.grid[1]} tokens: {what}: {verdict.reason}")
        y: Tensor | None = mixer(q, k, v, layout, mask) if verdict.mixer else None
        return y


class _Watch(JointForward):
    """Tells of every question and leaves the answer to attention."""

    def __init__(self, site: str, found: JointModel, original: Any, see: SeeCall) -> None:
        super().__init__(site, found, original)
        self.see = see

    def answer(self, q: Tensor, k: Tensor, v: Tensor, layout: JointLayout, mask: Tensor | None) -> None:
        self.see(self.site, q, k, v, layout, mask)


@contextmanager
def watched_joint(model: nn.Module, found: JointModel, sites: Iterable[str], see: SeeCall) -> Iterator[None]:
    """Inside, `see` is told (site id, q, k, v, layout, mask) of every call of the chosen attentions in which
    the image's place is known."""
    handle = model.register_forward_pre_hook(found.tell, with_kwargs=True)
    attentions = {site: found.attentions[site] for site in sites}
    try:
        with replaced((one, _Watch(site, found, one.forward, see)) for site, one in attentions.items()):
            yield
    finally:
        handle.remove()


class _Answering(TorchFunctionMode):
    """Has a forward answer PyTorch's attention."""

    def __init__(self, forward: JointForward) -> None:
        super().__init__()
        self.forward, self.met = forward, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.met = True
            y = self.forward.hear(*args, **kwargs)
            if y is not None:
                return y
        return func(*args, **kwargs)


def _attentions(model: Any, stacks: str, names: str = "attn") -> dict[str, Any]:
    """Site id -> attention, for lists of blocks and the names of the attentions in them."""
    return {
        # Z-Image has another name for what is the same in Lumina 2.
        f"{stack}.{number}.{'attn' if name == 'attention' else name}": getattr(block, name)
        for stack in stacks.split()
        for number, block in enumerate(getattr(model, stack))
        for name in names.split()
        if getattr(block, name, None) is not None
    }


def _flux(model: Any) -> JointModel:
    family = "chroma" if type(model).__name__.startswith("Chroma") else "flux"
    found = _attentions(model, "transformer_blocks single_transformer_blocks")
    return JointModel(family, found, _read_flux)


def _read_flux(given: dict[str, Any]) -> JointCall:
    """Text first; `img_ids` has the row and column of each of the image's tokens, and a number that tells
    references from it."""
    if given.get("kv_cache_mode"):
        return JointCall(why_not="keys of references are kept from an earlier step")
    ids, text = given["img_ids"], given["encoder_hidden_states"].shape[1]
    ids = ids[0] if ids.ndim == 3 else ids
    count = int((ids[:, 0] == ids[0, 0]).sum())
    last = (ids[:count, 1:] - ids[0, 1:]).amax(dim=0).tolist()
    height, width = int(last[0]) + 1, int(last[1]) + 1
    if height * width != count:
        return JointCall(why_not=f"its {count} tokens are no picture of {height} x {width}")
    return JointCall({text + given["hidden_states"].shape[1]: JointLayout((height, width), text)})


def _sd3(model: Any) -> JointModel:
    def read(given: dict[str, Any]) -> JointCall:
        """The image first; a second attention is of the image alone."""
        height, width = (side // model.config.patch_size for side in given["hidden_states"].shape[-2:])
        tokens = height * width
        queries = (tokens, tokens + given["encoder_hidden_states"].shape[1])
        return JointCall(dict.fromkeys(queries, JointLayout((height, width))))

    return JointModel("sd3", _attentions(model, "transformer_blocks", "attn attn2"), read)


def _lumina(model: Any) -> JointModel:
    def read(given: dict[str, Any]) -> JointCall:
        """Text first, as long as its mask says; the refiner has the image alone."""
        height, width = (side // model.config.patch_size for side in given["hidden_states"].shape[-2:])
        texts = set(given["encoder_attention_mask"].sum(dim=1).tolist())
        if len(texts) > 1:
            return JointCall(why_not=f"texts of {listing(map(str, sorted(texts)))} tokens are in one batch")
        (text,) = map(int, texts)
        grid, tokens = (height, width), height * width
        return JointCall({text + tokens: JointLayout(grid, text), tokens: JointLayout(grid)})

    return JointModel("lumina2", _attentions(model, "noise_refiner layers"), read)


def _z_image(model: Any) -> JointModel:
    return JointModel("lumina2", _attentions(model, "noise_refiner layers", "attention"), _read_z_image)


def _read_z_image(given: dict[str, Any]) -> JointCall:
    """The image first, then text, each filled up to a multiple; the refiner has the image alone."""
    pictures, patch = given["x"], given.get("patch_size", 2)
    if isinstance(pictures[0], list):
        return JointCall(why_not="there are several images one after the other")
    shapes = {tuple(one.shape[-3:]) for one in pictures}
    frames, height, width = next(iter(shapes))
    if frames > 1 or len(shapes) > 1:
        return JointCall(why_not="there are several images one after the other, or of several sizes")
    layout = JointLayout((height // patch, width // patch))
    image, text = (
        tokens + -tokens % Z_IMAGE_MULTIPLE
        for tokens in (layout.tokens, max(len(one) for one in given["cap_feats"]))
    )
    return JointCall(dict.fromkeys((image + text, image), layout))


def _qwen(model: Any) -> JointModel:
    return JointModel("qwen_image", _attentions(model, "transformer_blocks"), _read_qwen)


def _read_qwen(given: dict[str, Any]) -> JointCall:
    """Text first, then pictures, of which `img_shapes` has frames, rows and columns; the first is drawn."""
    shapes = [one[0] if isinstance(one, list) else one for one in given["img_shapes"]]
    frames, height, width = shapes[0]
    if frames > 1 or len(set(shapes)) > 1:
        return JointCall(why_not="there are several images one after the other, or of several sizes")
    text = given["encoder_hidden_states"].shape[1]
    return JointCall({text + given["hidden_states"].shape[1]: JointLayout((height, width), text)})


JOINT_FAMILIES: dict[str, Callable[[Any], JointModel]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux,
    "ChromaTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "Lumina2Transformer2DModel": _lumina,
    "ZImageTransformer2DModel": _z_image,
    "QwenImageTransformer2DModel": _qwen,
}
"""diffusers' classes -> what is known of them."""
