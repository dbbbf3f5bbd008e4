"""How local a model's self-attention is, layer by layer (Dong et al., arXiv 2504.21292, section 3).

The paper looks at the attention map A(i,j) of every query (i,j), averaged over heads and timesteps. What it
leaves open is decided here, and tested:

- Windows end at the border of the picture: pixels outside it do not exist (`windows`).
- The map is mirrored at its borders before the Fourier transform, so that they are no edges (`highpass`).
- The high-frequency part of a map may be negative. What counts is its positive part: the attention that
  stands out above the broad background. Its share in a window is taken of the layer's total (`statistics`).
- Heads are averaged as the paper does, before the high-pass. Maps of different timesteps cannot be averaged
  without keeping them all, so their statistics are.
"""

from .components import TwoComponents, fit_components
from .highpass import HighPass
from .maps import attention_maps
from .queries import EXACT_LIMIT, choose_queries
from .recommend import Recommendation, check_limit, recommend
from .result import LayerLocality, receptive_field
from .statistics import LayerStatistics
from .windows import window_mass

__all__ = [
    "EXACT_LIMIT",
    "HighPass",
    "LayerLocality",
    "LayerStatistics",
    "Recommendation",
    "TwoComponents",
    "attention_maps",
    "check_limit",
    "choose_queries",
    "fit_components",
    "receptive_field",
    "recommend",
    "window_mass",
]
