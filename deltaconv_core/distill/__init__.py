"""Distillation of self-attention into token mixers: the losses, the start, and the switch between both
modes."""

from .losses import feature_loss, min_snr_weight, output_losses
from .taps import Tap, tapped
from .warm_start import warm_start

__all__ = ["Tap", "feature_loss", "min_snr_weight", "output_losses", "tapped", "warm_start"]
