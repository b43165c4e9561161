"""SignRound: which way each weight is rounded, learnt by signed gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import QuantizedWeight, resolve_group
from .groups import as_groups, base_of, canonical, check_form, fit_groups
from .statistics import Statistics, check_statistics

_STEPS = 200


def quantize_signround(
    weight: Tensor,
    statistics: Statistics,
    bits: int = 4,
    group_size: int = 32,
    zeros: str = "point",
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """Codes ``round((w - base) / scale + v)``, |v| <= 1/2, v by the sign of the gradient of ``E|x W^T - x Q^T|^2``.

    weight: float [n, k], finite. statistics: of its inputs. Levels are those of the clip search; the best codes of all
    steps are kept for each row, so no row is worse than with v = 0. Rounding's derivative counts as one. Unlike the
    paper's, the objective is the output of the linear and not of the whole layer, and ranges are not learnt.

    Raises ValueError for a wrong argument, NaN or inf.
    Source: Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs".
    """
    check_form(weight, bits, group_size, zeros, scale_dtype)
    check_statistics(statistics, weight.shape[1])
    k, group = weight.shape[1], resolve_group(group_size, weight.shape[1])
    w = weight.detach().float()
    importance = as_groups(statistics.second.diagonal(), group)
    scale, zero = fit_groups(as_groups(w, group), importance, bits, zeros, scale_dtype)
    step, base = (x.repeat_interleave(group, 1)[:, :k] for x in (scale, base_of(scale, zero, zeros)))
    exact, v = (w - base) / step, torch.zeros_like(w)
    best, found = torch.full_like(w[:, 0], torch.inf), torch.zeros_like(w)
    for turn in range(_STEPS):
        codes = (exact + v).round_().clamp_(0, (1 << bits) - 1)
        change = codes * step + base - w
        gradient = change @ statistics.second
        error = (change * gradient).sum(1)
        found = torch.where((error < best)[:, None], codes, found)
        best = torch.minimum(error, best)
        v = (v - (1 - turn / _STEPS) / _STEPS * (gradient * step).sign_()).clamp_(-0.5, 0.5)
    return canonical(found, scale, zero, bits, group_size, zeros, scale_dtype)
