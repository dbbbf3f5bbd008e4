"""What a user tells a host of a distillation, whatever the host."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..sites.choose_specs import AUTO, FORMS, LEAN
from ..util.devices import SHORT_DTYPES
from .fields import BLOCKS, DATA, TRAINING, about, by_name
from .settings import Settings


@dataclass(frozen=True, kw_only=True)
class Job(Settings):
    """The settings of the training, which blocks to train, and how a batch is drawn.

    Both hosts add what only they ask for. `precision` may be "auto" here; `settings` has it decided.
    """

    precision: str = field(
        default=AUTO,
        metadata=about(
            TRAINING,
            "what is computed in; auto: bf16, fp16 on GPUs without it, fp32 on a CPU. The blocks' weights "
            "are fp32 while they learn",
            choices=(AUTO, *SHORT_DTYPES),
        ),
    )
    blocks: str = field(
        default="all",
        metadata=about(
            BLOCKS,
            "self-attentions to learn: a comma list of all, down, mid, up, and site names with wildcards; a "
            "leading - excludes, as in all,-mid. The others stay attention",
        ),
    )
    kernel_sizes: str = field(
        default=AUTO,
        metadata=about(
            BLOCKS,
            "side K of the blocks' kernels, odd, in tokens: auto (the authors' for models they published "
            'some for, like ones for others), one number for all, JSON by site such as {"down": 7, '
            '"mid_block": 5}, or the JSON of a recommendation (Attention Locality), whose skipped sites '
            "stay attention",
        ),
    )
    form: str = field(
        default=LEAN,
        metadata=about(
            BLOCKS,
            "what the blocks are made of: lean (fewer channels inside and a context stage; less work than "
            "the authors' and learns more) or released (as in the weights that the authors published; only "
            "these can be converted to their form)",
            choices=FORMS,
        ),
    )
    batch_size: int = field(
        default=1,
        metadata=about(TRAINING, "pictures in a batch, which run at once", least=1, offered=(1, 1024)),
    )
    caption_dropout: float = field(
        default=0.15,
        metadata=about(
            DATA,
            "part of the captions, from 0 to 1, that an empty one stands in for, drawn picture by picture; "
            "guidance (cfg) needs some",
            least=0,
            most=1,
            step=0.01,
        ),
    )

    def settings(self, precision: str) -> Settings:
        """What the training itself is told, with `precision` decided."""
        values = {name: getattr(self, name) for name in by_name(Settings)}
        return Settings(**values | {"precision": precision})
