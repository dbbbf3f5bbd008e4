"""What a distillation run is told, and what its learning rate is at each step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import DeltaConvError
from ..util.devices import SHORT_DTYPES
from .fields import RUN, TRAINING, about, by_name, check_fields
from .losses import BETA, GAMMA

OPTIMIZERS = ("adamw", "adamw8bit")
FEATURES = ("output", "residual")
LAYER_WISE, END_TO_END = "layer-wise", "end to end"
"""The two phases of the training."""
STEPS_OFFERED = (0, 1_000_000)


@dataclass(frozen=True)
class Settings:
    """How to distil (defaults follow the authors' configurations where they have one).

    Each field says what it does; the command's options and the node's widgets say it in the same words.

    Raises:
        DeltaConvError: a value that makes no sense, named.
    """

    layer_steps: int = field(
        default=500,
        metadata=about(
            TRAINING,
            "steps of the first phase, in which every block learns its own attention's output; quick and "
            "light",
            least=0,
            offered=STEPS_OFFERED,
        ),
    )
    output_steps: int = field(
        default=500,
        metadata=about(
            TRAINING,
            "steps of the second phase, in which the blocks learn end to end to keep the model's output as "
            "it was",
            least=0,
            offered=STEPS_OFFERED,
        ),
    )
    learning_rate: float = field(
        default=3e-4,
        metadata=about(
            TRAINING,
            "peak of AdamW's, in both phases; it rises at the start of a phase and falls at its end",
            above=0,
            offered=(1e-7, 1.0),
            step=1e-7,
        ),
    )
    warmup: int = field(
        default=50,
        metadata=about(
            TRAINING, "steps at the start of each phase in which the learning rate rises to its peak", least=0
        ),
    )
    decay: float = field(
        default=0.5,
        metadata=about(
            TRAINING,
            "the last part of each phase, from 0 to 1, in which the learning rate falls to a twentieth "
            "along a cosine; 0 keeps it",
            least=0,
            most=1,
        ),
    )
    betas: tuple[float, float] = field(
        default=(0.9, 0.99), metadata=about(TRAINING, "decay rates of AdamW's two moments", least=0, below=1)
    )
    weight_decay: float = field(
        default=0.01, metadata=about(TRAINING, "weight decay of AdamW, from 0 to 1", least=0, most=1)
    )
    clip: float = field(
        default=1.0,
        metadata=about(TRAINING, "largest norm of the gradient of all blocks; 0 does not clip", least=0),
    )
    accumulation: int = field(
        default=1,
        metadata=about(TRAINING, "batches whose gradients make one step", least=1, offered=(1, 1024)),
    )
    ema: float = field(
        default=0.995,
        metadata=about(
            TRAINING,
            "the result is a moving average of the weights, of which this part, from 0 to below 1, stays "
            "at each step; 0 takes the last weights and saves a copy of the blocks",
            least=0,
            below=1,
            offered=(0, 0.99999),
            step=0.00001,
        ),
    )
    precision: str = field(
        default="fp32",
        metadata=about(
            TRAINING,
            "what is computed in (autocast); the blocks' weights are fp32 while they learn",
            choices=tuple(SHORT_DTYPES),
        ),
    )
    optimizer: str = field(
        default="adamw",
        metadata=about(
            TRAINING,
            "AdamW as it is, or adamw8bit, which needs the package bitsandbytes and a GPU",
            choices=OPTIMIZERS,
        ),
    )
    beta: float = field(
        default=BETA,
        metadata=about(
            TRAINING, "weight of the feature loss beside the output losses, in the second phase", least=0
        ),
    )
    gamma: float = field(
        default=GAMMA,
        metadata=about(
            TRAINING,
            "gamma of Min-SNR: the signal-to-noise ratio above which a loss weighs less, in the second phase",
            least=0,
        ),
    )
    feature: str = field(
        default="output",
        metadata=about(
            TRAINING,
            "what the feature loss of the second phase compares: the blocks' output with attention's (the "
            "paper), or the residual stream that it is added to (the authors' code)",
            choices=FEATURES,
        ),
    )
    checkpointing: bool = field(
        default=True,
        metadata=about(TRAINING, "in the second phase, run the model's parts twice to need far less memory"),
    )
    save_every: int = field(
        default=100,
        metadata=about(
            RUN,
            "steps between saved states; at most this many steps can be lost",
            least=1,
            offered=(1, 1_000_000),
        ),
    )
    seed: int = field(
        default=0,
        metadata=about(
            TRAINING,
            "what the blocks' start, the noise and the order of the data follow from",
            offered=(0, 0xFFFFFFFF),
        ),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        check_fields(self)
        if self.steps < 1:
            raise DeltaConvError("expected layer_steps + output_steps to be at least 1, got 0")

    @property
    def steps(self) -> int:
        """All optimizer steps."""
        return self.layer_steps + self.output_steps

    def phase(self, step: int) -> str:
        """LAYER_WISE or END_TO_END, of a step counted from 0."""
        return LAYER_WISE if step < self.layer_steps else END_TO_END

    def rate(self, step: int) -> float:
        """The learning rate of a step counted from 0."""
        if self.phase(step) == LAYER_WISE:
            done, steps = step, self.layer_steps
        else:
            done, steps = step - self.layer_steps, self.output_steps
        if done < self.warmup:
            return self.learning_rate * (done + 1) / self.warmup
        falling = self.decay * steps
        progress = max(0.0, done - (steps - falling)) / falling if falling else 0.0
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Settings from `to_dict`'s values.

        Raises:
            DeltaConvError: unknown names, or values that the settings refuse.
        """
        unknown = sorted(values.keys() - by_name(cls).keys())
        if unknown:
            raise DeltaConvError(
                f"unknown settings {', '.join(unknown)} of a distillation; resume with the version of "
                "ComfyUI-DeltaConv that wrote them"
            )
        return cls(**values)
