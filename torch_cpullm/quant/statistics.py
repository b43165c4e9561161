"""What a recipe knows about the inputs x of a linear layer: second moments and magnitudes, gathered batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 256  # columns of a block of second moments


@dataclass(frozen=True)
class Statistics:
    """Inputs x [rows, k] in short. second: E[x x^T], float32 [k, k]; magnitude: E|x|, float32 [k]; rows: how many."""

    second: Tensor
    magnitude: Tensor
    rows: int

    @staticmethod
    def empty(k: int, device: torch.device | None = None) -> Statistics:
        """Of no rows, on the device of the rows to come."""
        return Statistics(torch.zeros(k, k, device=device), torch.zeros(k, device=device), 0)

    def with_rows(self, x: Tensor) -> Statistics:
        """These and the rows of x [.., k]; ValueError for NaN or inf."""
        x = x.detach().flatten(0, -2).float()
        if len(x) == 0:
            return self
        if not bool(torch.isfinite(x).all()):
            raise ValueError("the inputs hold NaN or inf")
        share = len(x) / (self.rows + len(x))
        second = self.second * (1 - share)
        for begin in range(0, x.shape[1], _BLOCK):  # the blocks on and above the diagonal; those below mirror them
            end = begin + _BLOCK
            second[begin:end, begin:].addmm_(x[:, begin:end].T, x[:, begin:], alpha=share / len(x))
            second[end:, begin:end] = second[begin:end, end:].T
        return Statistics(second, self.magnitude.lerp(x.abs().mean(0), share), self.rows + len(x))

    def divided(self, scales: Tensor) -> Statistics:
        """Of x / scales, scales [k]."""
        return Statistics(self.second / scales / scales[:, None], self.magnitude / scales, self.rows)


def output_error(change: Tensor, statistics: Statistics) -> float:
    """E|x D^T|^2 for a change D [n, k] of the weight: the squared error of the layer's output per row of x."""
    return float(((change @ statistics.second) * change).sum())


def check_statistics(statistics: Statistics, k: int) -> None:
    """ValueError unless they are of inputs of width k."""
    if list(statistics.second.shape) != [k, k] or list(statistics.magnitude.shape) != [k]:
        raise ValueError(f"statistics must be of {k} inputs, got {list(statistics.second.shape)}")
    if statistics.rows == 0:
        raise ValueError("statistics must hold at least one row")
