"""Recipes: functions from a float weight to a :class:`torch_cpullm.packing.QuantizedWeight`."""

from .awq import awq_scales, teq_scales
from .clip import quantize_clip
from .gptq import quantize_gptq, refine
from .hqq import quantize_hqq
from .rtn import quantize_rtn
from .signround import quantize_signround
from .statistics import Statistics, output_error

__all__ = [
    "Statistics",
    "awq_scales",
    "output_error",
    "quantize_clip",
    "quantize_gptq",
    "quantize_hqq",
    "quantize_rtn",
    "quantize_signround",
    "refine",
    "teq_scales",
]
