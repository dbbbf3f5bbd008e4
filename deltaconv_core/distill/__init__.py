"""Distillation of self-attention into token mixers, whatever the host."""

from .loop import Result, check_same_run, distill, is_finished
from .losses import min_snr_weight, output_losses
from .processes import Processes
from .run_folder import Row, RunFolder
from .settings import Settings
from .taps import Tap, Taps, tapped
from .task import Batch, EndToEnd, LayerWise, Network
from .warm_start import random_start, warm_start

__all__ = [
    "Batch",
    "EndToEnd",
    "LayerWise",
    "Network",
    "Processes",
    "Result",
    "Row",
    "RunFolder",
    "Settings",
    "Tap",
    "Taps",
    "check_same_run",
    "distill",
    "is_finished",
    "min_snr_weight",
    "output_losses",
    "random_start",
    "tapped",
    "warm_start",
]
