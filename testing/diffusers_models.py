"""Tiny models and a pipeline of diffusers' own classes with random weights, and blocks for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from scripts.comfy_host import prepare_torchvision

prepare_torchvision()  # diffusers imports it by way of transformers

import diffusers  # noqa: E402

from deltaconv_core import BlockSpec, Checkpoint, DeltaConvBlock  # noqa: E402
from deltaconv_core.diffusers.sites import find_sites  # noqa: E402

CONTEXT_DIM = 16
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
CONFIGS: dict[str, dict[str, Any]] = {
    # as SD 1.5: attention in all levels but the last, convolutions as projections
    "sd": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": (CROSS, CROSS, PLAIN),
        "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP),
        "attention_head_dim": 2,
    },
    # as SDXL: no attention in the first level, several blocks deep, picture size among the conditions
    "xl": {
        "block_out_channels": (16, 32),
        "down_block_types": (PLAIN, CROSS),
        "up_block_types": (CROSS_UP, PLAIN_UP),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    },
}
KINDS = (*CONFIGS, "pixart")


def make(kind: str) -> Any:
    """A model with the same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "pixart":
            model = diffusers.PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                cross_attention_dim=24,
                caption_channels=CONTEXT_DIM,
                num_layers=3,
                sample_size=16,
                use_additional_conditions=False,
            )
        else:
            model = diffusers.UNet2DConditionModel(
                layers_per_block=1,
                norm_num_groups=4,
                cross_attention_dim=CONTEXT_DIM,
                sample_size=16,
                **CONFIGS[kind],
            )
        for parameter in model.parameters():
            parameter.data = noise(parameter.shape)
    return model.eval().requires_grad_(False)


def noise(shape: torch.Size) -> torch.Tensor:
    """Weights by which a network neither explodes nor fades."""
    if len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape)
    return torch.randn(shape) * 0.7 / torch.Size(shape[1:]).numel() ** 0.5


def make_checkpoint(model: Any, **spec: Any) -> Checkpoint:
    """Random blocks for every site, with outputs as large as the attention's."""
    found = find_sites(model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        blocks = {
            site: DeltaConvBlock(BlockSpec(channels, 3, **spec)) for site, channels in found.channels.items()
        }
        for block in blocks.values():
            block.requires_grad_(False)
            block.conv_out.weight *= 20
            block.conv_pool.weight *= 20
    return Checkpoint(found.architecture, blocks)


def run(model: Any, size: tuple[int, int] = (16, 12), batch: int = 1, timestep: Any = 500) -> torch.Tensor:
    """The output for random input, always the same one."""
    make = torch.Generator().manual_seed(2)
    dtype = model.dtype
    x = torch.randn(batch, 4, *size, generator=make).to(dtype)
    context = torch.randn(batch, 5, CONTEXT_DIM, generator=make).to(dtype)
    with torch.no_grad():
        return call(model, x, context, timestep)


def call(model: Any, x: torch.Tensor, context: torch.Tensor, timestep: Any, **more: Any) -> torch.Tensor:
    """One call as the pipelines make it."""
    batch = len(x)
    if getattr(model.config, "addition_embed_type", None):
        more["added_cond_kwargs"] = {
            "text_embeds": torch.linspace(-1, 1, 12).to(x).expand(batch, 12),
            "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]]).to(x).expand(batch, 6),
        }
    if "caption_channels" in model.config:
        t = torch.as_tensor(timestep, device=x.device)
        t = t.expand(batch) if t.ndim == 0 else t
        more["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        return model(x, encoder_hidden_states=context, timestep=t, **more).sample
    return model(x, timestep, encoder_hidden_states=context, **more).sample


def by_hand(model: Any, checkpoint: Checkpoint, size: tuple[int, int]) -> Any:
    """The model with the blocks put in for good, told the grids of this latent size."""
    for site, block in checkpoint.blocks.items():
        grid = grid_of(model, site, size)
        attention = model.get_submodule(site)
        attention.forward = lambda x, *_, block=block, grid=grid, **__: block.to(x.dtype)(x, grid)
    return model


def grid_of(model: Any, site: str, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tokens: every level of a U-Net halves and rounds up, a patch is 2 x 2."""
    if site.startswith("transformer_blocks"):
        return size[0] // 2, size[1] // 2
    side, number = site.split(".")[:2]
    last = len(model.config.block_out_channels) - 1
    level = (
        {"down_blocks": int(number), "up_blocks": last - int(number)}[side] if side != "mid_block" else last
    )
    return -(-size[0] >> level), -(-size[1] >> level)


def make_pipeline(folder: Path, **parts: Any) -> Any:
    """A StableDiffusionPipeline of tiny parts around the "sd" model; nothing is downloaded.

    Args:
        folder: for the files of the tokenizer.
        parts: instead of the ones made here.
    """
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = {
            "unet": make("sd"),
            "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
            "text_encoder": make_clip(layers=2),
            "tokenizer": make_tokenizer(folder),
            "vae": make_vae(),
            "safety_checker": None,
            "feature_extractor": None,
        }  # fmt: skip
    kind = (
        diffusers.StableDiffusionControlNetPipeline
        if "controlnet" in parts
        else diffusers.StableDiffusionPipeline
    )
    pipe = kind(**(made | parts), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pixart_pipeline(folder: Path) -> Any:
    """A PixArtSigmaPipeline of tiny parts around the "pixart" model."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipe = diffusers.PixArtSigmaPipeline(
            tokenizer=make_tokenizer(folder),
            text_encoder=make_t5(),
            vae=make_vae(),
            transformer=make("pixart"),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_flux_pipeline(folder: Path) -> Any:
    """A FluxPipeline of tiny parts."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipe = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=make_vae(),
            text_encoder=make_clip(layers=1),
            tokenizer=make_tokenizer(folder),
            text_encoder_2=make_t5(),
            tokenizer_2=make_tokenizer(folder),
            transformer=diffusers.FluxTransformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=CONTEXT_DIM, pooled_projection_dim=CONTEXT_DIM,
                axes_dims_rope=(4, 6, 6),
            ).eval().requires_grad_(False),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_clip(layers: int) -> Any:
    """A text encoder for `make_tokenizer`."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=CONTEXT_DIM, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval()


def make_t5() -> Any:
    """Likewise."""
    import transformers

    config = transformers.T5Config(
        vocab_size=64, d_model=CONTEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


def make_vae() -> Any:
    """It halves height and width."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def make_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with one token for every letter."""
    import transformers

    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def sample(pipe: Any, **options: Any) -> torch.Tensor:
    """Latents of a few steps with classifier-free guidance, the same noise every time."""
    options = {
        "prompt": "a cat", "negative_prompt": "dog", "num_inference_steps": 3, "guidance_scale": 4.0,
        "height": 24, "width": 32, "output_type": "latent", "generator": torch.Generator().manual_seed(4),
    } | options  # fmt: skip
    return pipe(**options).images
