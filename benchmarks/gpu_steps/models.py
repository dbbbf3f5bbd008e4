"""The steps `models`, `large` and `large-model`: U-Nets of diffusers, and pictures of 8640 x 15360."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltaconv_core import BlockSpec, DeltaConvBlock, bench

from ..gpu import Row
from .blocks import bound_ms, layer
from .run import NotCaptured, Run, Size, elapsed, graphed, wall_ms

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
TINY_XL = TINY | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
MODELS = (("sdxl 1024²", SDXL, TINY_XL, 128), ("sd15 1024²", SD15, TINY, 128), ("sd15 512²", SD15, TINY, 64))
STATES = ("attention", "ΔConv", "attn1 off", "hybrid")


def models(run: Run) -> None:
    for name, full, tiny, side in MODELS:
        if any(f"{name} {state}" not in run.known for state in (*STATES, "in turns")):
            run.cases(name, partial(model_cases, run, name, run.pick(full, tiny), run.pick(side, 8)))
        gc.collect()
        if not run.tiny:
            torch.cuda.empty_cache()


def model_cases(run: Run, name: str, config: dict[str, Any], side: int) -> None:
    unet = make_unet(run, config)
    call = partial(forward, unet, inputs(run, unet, 2, (side, side)))
    replays: dict[str, Callable[[], object]] = {}
    held: list[Any] = []  # what graphs read must stay where it is
    for state in STATES:
        run.case(f"{name} {state}", partial(model_row, run, unet, state, call, replays, held))
    run.case(f"{name} in turns", partial(in_turns, run, replays))


def make_unet(run: Run, config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(run.pick(torch.float16, torch.float32))
    try:
        with torch.device(run.device):
            return UNet2DConditionModel(**config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def inputs(run: Run, unet: Any, batch: int, latent: Size) -> dict[str, Any]:
    config, dtype = unet.config, unet.dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=run.device).to(dtype)

    given: dict[str, Any] = {
        "sample": noise(batch, 4, *latent),
        "timestep": torch.full((batch,), 500, device=run.device),
        "encoder_hidden_states": noise(batch, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        ids = 6 * config.addition_time_embed_dim
        text = noise(batch, config.projection_class_embeddings_input_dim - ids)
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": 64 * noise(batch, 6).abs()}
    return given


def forward(unet: Any, given: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        y: Tensor = unet(**given).sample
        return y


def model_row(
    run: Run, unet: Any, state: str, call: Callable[[], Tensor], replays: dict[str, Any], held: list[Any]
) -> Row:
    with in_state(run, unet, state):
        held.append(list(unet.modules()))
        begun = time.time()
        y = call()
        bench.synchronize(run.device)
        row: Row = {"first_s": time.time() - begun, "finite": bool(y.isfinite().all())}
        del y
        call()
        if not run.tiny:
            torch.cuda.reset_peak_memory_stats()
        row["eager_ms"] = statistics.median(wall_ms(call, run.device, 1) for _ in range(run.pick(10, 1)))
        row["host_ms"] = host_ms_of_one(call, run.device, run.pick(3, 1))
        if not run.tiny:
            row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        if state == "hybrid":  # solves equations, which is not known to go into a graph
            return row
        try:
            replay = graphed(call, run.device)
            row["graph_ms"] = elapsed(replay, run.device, run.pick(10, 1))
            replays[state] = replay
        except NotCaptured as error:
            row |= {"graph": str(error)[:300], "broken": True}
    return row


def host_ms_of_one(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Milliseconds until one call is queued. (Where its queue is full, the host waits.)"""
    taken = []
    for _ in range(rounds):
        bench.synchronize(device)
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    bench.synchronize(device)
    return 1000 * statistics.median(taken)


def in_turns(run: Run, replays: dict[str, Callable[[], object]]) -> Row:
    """The graphs one after another, so that the clock of the GPU is the same for all."""
    taken: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(run.pick(10, 1)):
        for name, replay in replays.items():
            taken[name].append(elapsed(replay, run.device, 1))
    row: Row = {f"{name} ms": statistics.median(times) for name, times in taken.items()}
    off = row.get("attn1 off ms")
    if off:
        row |= {f"{name}/off": row[f"{name} ms"] / off for name in replays if name != "attn1 off"}
    return row


@contextmanager
def in_state(run: Run, unet: Any, state: str) -> Iterator[None]:
    """The U-Net with what stands in for its self-attention."""
    if state == "attention":
        yield
        return
    from deltaconv_core.diffusers.sites import find_sites

    found = find_sites(unet)
    if state == "attn1 off":
        # The residual alone would do; it costs an addition that is there in the other states too.
        for attention in found.attentions.values():
            attention.__dict__["forward"] = lambda hidden_states, *_, **__: hidden_states
        try:
            yield
        finally:
            for attention in found.attentions.values():
                del attention.__dict__["forward"]
        return
    from deltaconv_core import diffusers as adapter
    from deltaconv_core.weights.checkpoint import Checkpoint

    made = made_blocks(run, unet, found, state)
    adapter.apply(unet, Checkpoint(found.architecture, made))
    try:
        yield
    finally:
        adapter.remove(unet)


def made_blocks(run: Run, unet: Any, found: Any, state: str) -> dict[str, nn.Module]:
    from deltaconv_core.mixers.hybrid import HybridMixer, HybridSpec
    from deltaconv_core.sites import authors_specs

    if state == "hybrid":
        heads = {site: int(attention.heads) for site, attention in found.attentions.items()}
        return {
            site: HybridMixer(HybridSpec(channels, heads[site], channels // heads[site]), run.device)
            for site, channels in found.channels.items()
        }
    known = {} if run.tiny else authors_specs(found.architecture)
    return {
        site: DeltaConvBlock(known.get(site, BlockSpec(channels, 3)), run.device, unet.dtype)
        for site, channels in found.channels.items()
    }


# ---- 7: 16K ----


def large(run: Run) -> None:
    latent = run.pick((1080, 1920), (6, 10))
    for channels, K in run.pick(((320, 7), (640, 9)), ((32, 3),)):
        for name in ("triton", "torch"):
            case = f"{latent[0]}x{latent[1]} C{channels} K{K} {name}"
            run.case(case, partial(large_block, run, latent, BlockSpec(channels, K), name))


def large_block(run: Run, latent: Size, spec: BlockSpec, name: str) -> Row:
    dtype = run.pick(torch.float16, torch.float32)
    module, context = layer(run, spec, dtype, name)
    x = torch.randn(1, latent[0] * latent[1], spec.dim, device=run.device, dtype=dtype)
    row: Row = {"bound_ms": bound_ms(spec, latent, dtype, 1)}
    with torch.inference_mode(), context():
        module(x, latent)
        if not run.tiny:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        row["ms"] = elapsed(lambda: module(x, latent), run.device, run.pick(3, 1))
        if not run.tiny:
            row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def large_model(run: Run) -> None:
    latent = run.pick((1080, 1920), (8, 12))

    def measure(state: str) -> Row:
        unet = make_unet(run, run.pick(SD15, TINY))
        call = partial(forward, unet, inputs(run, unet, 1, latent))
        with in_state(run, unet, state):
            begun = time.time()
            call()
            bench.synchronize(run.device)
            row: Row = {"first_s": time.time() - begun}
            if not run.tiny:
                torch.cuda.reset_peak_memory_stats()
            row["s"] = elapsed(call, run.device, run.pick(2, 1)) / 1000
            if not run.tiny:
                row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        return row

    for state in ("ΔConv", "attn1 off"):
        run.case(f"sd15 {latent[0]}x{latent[1]} {state}", partial(measure, state))
