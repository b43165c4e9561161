"""Recipes: functions from a float weight to a :class:`torch_cpullm.packing.QuantizedWeight`."""

from .rtn import quantize_rtn

__all__ = ["quantize_rtn"]
