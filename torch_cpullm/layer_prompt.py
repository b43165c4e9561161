"""A prompt of which the last token's logits are asked alone: the last layer computes that token alone.

So after a prompt whose logits were, bit for bit, a packed head's of the last norm's of what the last layer returned for
the last token, with nothing else in the result but the cache. The token has the same bits as among all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .layer_decoder import SETTINGS, TRIES, DecoderStep, children, gives
from .layer_watch import Glance, Watch
from .linear import PackedLinear

_RESULT = {"logits", "past_key_values"}  # all that is in the result of such a call


@dataclass(frozen=True)
class _Learnt:
    """parts: the last norm and the head, which watch keeps an eye on; model, decoder: what else decides what a model
    makes of hidden states.
    """

    parts: nn.ModuleList
    watch: Watch
    model: Glance
    decoder: Glance


class PromptStep:
    """Prompts of one model instance."""

    def __init__(self) -> None:
        self._learnt: _Learnt | None = None
        self._tries = TRIES

    def __call__(
        self, model: Any, decoder: nn.Module, step: DecoderStep, cache: Any, forward: Callable[[], Any]
    ) -> Any:
        """``forward()``, a plain call of the model for the last token's logits. cache: its past_key_values."""
        learnt, stack = self._learnt, step.prompts()
        if stack is None or not (learnt or self._tries):
            return forward()
        if learnt is not None:
            if learnt.watch.waiting():
                return forward()
            if learnt.watch.same() and learnt.model.same(model) and learnt.decoder.same(decoder):
                with stack.last_of_prompt(only=True):
                    return forward()
            self._learnt = None
        glances, names = (Glance(model), Glance(decoder, SETTINGS)), _names(model, decoder)
        with stack.last_of_prompt(only=False) as ends:
            out = forward()
        if len(ends) != 1:  # the last layer's program did not run
            return out
        self._tries -= 1
        if getattr(out, "past_key_values", None) is not cache:
            return out
        # A class that keeps something of its hidden states would keep something else.
        kept = names != _names(model, decoder) or not glances[0].same(model) or not glances[1].same(decoder)
        if not kept and {name for name, value in vars(out).items() if value is not None} == _RESULT:
            self._learn(model, decoder, glances, ends[0], out.logits)
        return out

    def _learn(self, model: Any, decoder: nn.Module, glances: tuple[Glance, Glance], y: Tensor, logits: Tensor) -> None:
        heads = [module for module in model.children() if isinstance(module, PackedLinear)]
        for norm in children(decoder):
            for head in heads:
                if gives(nn.Sequential(norm, head), logits, y):
                    parts = nn.ModuleList([norm, head])
                    self._learnt = _Learnt(parts, Watch([parts], None), *glances)
                    self._tries = TRIES
                    return


def _names(*modules: nn.Module) -> list[set[str]]:
    """The names of their attributes."""
    return [set(vars(module)) for module in modules]
