"""A decoder layer that is cut among ranks: two operators, attention and MLP, with a sum over the ranks after each.

Where the ranks share memory the operator of a whole layer, or of all layers, makes the sums itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .layer_program import Program, fitting, run_group
from .layer_reference import CacheLayer
from .layer_spec import LayerSpec, Norm


class CutProgram(Program):
    """``program(x, cos, sin, mask, cache) -> y`` of this rank's share of a layer; arguments as of :class:`Program`.

    y is the whole layer's output, the same bits on all ranks. RuntimeError where a rank is dead or hangs.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self._norm, self._eps, self._parallel, self._scale = spec.norm, spec.eps, spec.parallel, spec.residual_scale
        self._after = spec.post_attention_norm, spec.post_mlp_norm

    @property
    def operators(self) -> int:
        """Of a run: 1 where it makes the sums itself, else 2."""
        return 1 if self.ranks.transport == "shared memory" else 2

    def __call__(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, cache: CacheLayer | None
    ) -> Tensor:
        """Run the layer once; the cache takes this rank's heads of the new tokens."""
        if self.operators == 1:
            y = run_group([self], 0, [(x, cos, sin, mask, cache)])
            assert y is not None, "one program has one cache"
            return y
        a = self._attend(x, cos, sin, mask, cache)
        if self._parallel:
            return x.float().add(self.ranks.sum(a + ops.layer_mlp(self.handle, x))).to(x.dtype)
        r = self._add(x.float(), self.ranks.sum(a), self._after[0])
        return self._add(r, self.ranks.sum(ops.layer_mlp(self.handle, r)), self._after[1]).to(x.dtype)

    def added(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, cache: CacheLayer | None
    ) -> Tensor:
        """This rank's summand, float32, of what the layer adds to x; what all have whole, the first one adds."""
        a, none = self._attend(x, cos, sin, mask, cache), torch.zeros(x.shape, dtype=torch.float32)
        if self._parallel:
            return a + ops.layer_mlp(self.handle, x)
        a = self._add(none, self.ranks.sum(a), self._after[0])
        m = ops.layer_mlp(self.handle, x.float() + a)
        first = self.ranks.rank == 0
        if self._after[1] is not None:
            m = self.ranks.sum(m)
            return self._add(a, m, self._after[1]) if first else none
        return self._add(a if first else none, m, None)

    def _attend(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, cache: CacheLayer | None
    ) -> Tensor:
        """This rank's summand of attention's output; the cache takes its heads of the new tokens."""
        k, v, k_scale, v_scale, length = (None, None, None, None, 0) if cache is None else self.reserve(cache, x)
        mask = fitting(mask, length + x.shape[1])
        a = ops.layer_attention(self.handle, x, cos, sin, mask, k, v, k_scale, v_scale, length)
        if cache is not None:
            cache.advance(x.shape[1])
        return a

    def _add(self, x: Tensor, y: Tensor, norm: Norm | None) -> Tensor:
        """``x + residual_scale * norm(y)``."""
        if norm is not None and self._norm == "rms":
            y = ops.rms_norm(y, norm.gain, self._eps)
        elif norm is not None:
            y = ops.layer_norm(y, norm.gain, norm.bias, self._eps)
        return torch.add(x, y, alpha=self._scale)


def added_by(programs: Sequence[Any], calls: Sequence[Any]) -> Tensor:
    """This rank's summand of ``sum_l (a_l + m_l)`` of layers that read one x and are cut among a team; float32.

    programs: a CutProgram each; calls: their arguments.
    """
    return torch.stack([program.added(*call) for program, call in zip(programs, calls, strict=True)]).sum(0)
