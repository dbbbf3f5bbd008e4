"""What a distillation run is told, and what its learning rate is at each step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import DeltaConvError
from ..util.devices import SHORT_DTYPES
from .losses import BETA, GAMMA

OPTIMIZERS = ("adamw", "adamw8bit")
FEATURES = ("output", "residual")
LAYER_WISE, END_TO_END = "layer-wise", "end to end"


@dataclass(frozen=True)
class Settings:
    """How to distil (defaults follow the authors' configurations where they have one).

    Args:
        layer_steps: optimizer steps in which every block learns its own attention's output.
        output_steps: optimizer steps after those, in which the blocks learn end to end.
        learning_rate: peak of AdamW's, in both phases.
        warmup: steps at the start of each phase in which the rate rises to its peak.
        decay: the last part of each phase in which it falls to a twentieth along a cosine; 0 keeps it.
        betas, weight_decay: of AdamW.
        clip: largest norm of the gradient of all blocks; 0 does not clip.
        accumulation: batches whose gradients make one step.
        ema: decay per step of the average of the weights that is the result; 0 takes the last weights.
        precision: "fp32", "bf16" or "fp16" (autocast); the blocks' weights are float32 in any case.
        optimizer: "adamw" | "adamw8bit", which needs bitsandbytes.
        beta: weight of the feature loss beside the output losses, end to end.
        gamma: of Min-SNR.
        feature: the feature loss compares the blocks' "output" with attention's (paper), or the "residual"
            stream that it is added to (authors' code).
        checkpointing: end to end, keep only the inputs of the network's segments and run them twice.
        save_every: steps between saved states.
        seed: of the blocks; noise, timesteps and the order of the data are made from it too.

    Raises:
        DeltaConvError: a value that makes no sense, named.
    """

    layer_steps: int = 500
    output_steps: int = 500
    learning_rate: float = 3e-4
    warmup: int = 50
    decay: float = 0.5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulation: int = 1
    ema: float = 0.995
    precision: str = "fp32"
    optimizer: str = "adamw"
    beta: float = BETA
    gamma: float = GAMMA
    feature: str = "output"
    checkpointing: bool = True
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, least in (("layer_steps", 0), ("output_steps", 0), ("warmup", 0), ("accumulation", 1)):
            self._check(name, isinstance(getattr(self, name), int) and getattr(self, name) >= least, least)
        self._check("save_every", self.save_every >= 1, 1)
        if self.steps < 1:
            raise DeltaConvError("expected layer_steps + output_steps to be at least 1, got 0")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise DeltaConvError(f"expected a learning_rate above 0, got {self.learning_rate}")
        for name in ("decay", "ema", "weight_decay", *(("betas",) * 2)):
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if not 0 <= value <= 1 or (name in ("ema", "betas") and value == 1):
                    raise DeltaConvError(f"expected {name} from 0 to below 1, got {value}")
        for name in ("clip", "beta", "gamma"):
            self._check(name, getattr(self, name) >= 0, 0)
        for name, known in (("precision", SHORT_DTYPES), ("optimizer", OPTIMIZERS), ("feature", FEATURES)):
            if getattr(self, name) not in known:
                raise DeltaConvError(
                    f"expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    def _check(self, name: str, good: bool, least: int) -> None:
        if not good:
            raise DeltaConvError(f"expected {name} to be at least {least}, got {getattr(self, name)!r}")

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
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise DeltaConvError(f"unknown settings {unknown} of a distillation")
        return cls(**values)
