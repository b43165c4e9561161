"""A decode step of a whole language model: its decoder's layers, the last norm and the output head in one operator.

It is taken after a step in which the logits were the head's of what the decoder returned, bit for bit, and nothing else
was in the result. So a model that caps or scales its logits, or whose head has an adapter, goes through its class's
forward, as does every call that is more than one token per sequence.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from .layer_decoder import TRIES, DecoderStep, gives
from .layer_parts import NoMatchError, read_norm
from .layer_program import Head
from .layer_prompt import PromptStep
from .layer_watch import Glance, Watch
from .linear import PackedLinear
from .ops import recording

_SAME = ("input_ids", "attention_mask", "position_ids", "past_key_values")  # what the decoder gets as the model got it


@dataclass(frozen=True)
class _Learnt:
    """parts: the last norm and the head; watch, glance: whether those and the model are what they were; kind: the class
    of the result.
    """

    head: Head
    parts: nn.ModuleList
    watch: Watch
    kind: type
    glance: Glance


class TokenStep:
    """``forward`` of one model instance. Holds no strong reference to it, so that a deleted model is gone at once."""

    def __init__(self, model: nn.Module, decoder: nn.Module | None) -> None:
        """decoder: the child that has a DecoderStep; None: of a copied model, which computes as its class does."""
        self._model = weakref.ref(model)
        self._decoder = None if decoder is None else weakref.ref(decoder)
        self._original = type(model).forward
        parameters = list(inspect.signature(self._original).parameters.values())[1:]
        self._names = [parameter.name for parameter in parameters]
        self.__signature__ = inspect.Signature(parameters)  # generate() looks whether there is logits_to_keep
        self._learnt: _Learnt | None = None
        self._tries = TRIES
        self._prompts = PromptStep()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward: arguments and result are those of its class."""
        model: Any = self._model()
        decoder = None if self._decoder is None else self._decoder()
        if recording() or decoder is None:
            return self._original(model, *args, **kwargs)
        step: Any = decoder.__dict__.get("forward")
        named = dict(zip(self._names, args, strict=False)) | kwargs
        once = len(named) == len(args) + len(kwargs)
        keep = named.pop("logits_to_keep", 0)
        plain = once and (keep is None or (keep.__class__ is int and keep >= 0))  # of one token
        tokens = step.plain(named) if plain and isinstance(step, DecoderStep) else 0
        if tokens > 1 and keep == 1 and not _hooked(decoder):
            forward = functools.partial(self._original, model, *args, **kwargs)
            return self._prompts(model, decoder, step, named["past_key_values"], forward)
        if tokens != 1 or not (self._tries or self._learnt):
            return self._original(model, *args, **kwargs)
        learnt = self._learnt
        if learnt is None:
            return self._look_on(model, decoder, step, named, args, kwargs)
        norm = learnt.parts[0]
        if not learnt.glance.same(model) or not learnt.watch.same() or step.norm not in (norm, None):
            self._learnt = None  # None: the decoder is about to learn it again
        elif not learnt.watch.waiting() and not _hooked(decoder):
            logits = step.logits(decoder, named, learnt.head, norm)
            if logits is not None:
                self._tries = TRIES  # what was learnt holds
                return learnt.kind(logits=logits, past_key_values=named["past_key_values"])
        return self._original(model, *args, **kwargs)

    # ---- learning ---------------------------------------------------------------------------------------------------

    def _look_on(
        self, model: Any, decoder: nn.Module, step: DecoderStep, named: dict[str, Any], args: tuple, kwargs: dict
    ) -> Any:
        """The class's result; the short way is taken from now on if it would have given the same."""
        step.want_done()
        try:
            out = self._original(model, *args, **kwargs)
        finally:
            done = step.take_done()
        if done is None or not step.is_whole or step.norm is None or _hooked(decoder):
            return out
        self._tries -= 1
        if getattr(out, "past_key_values", None) is not named["past_key_values"]:
            return out
        if {name for name, value in vars(out).items() if value is not None} != {"logits", "past_key_values"}:
            return out
        if any(done.kwargs.get(name) is not named.get(name) for name in _SAME):
            return out
        packed = [module for module in model.children() if isinstance(module, PackedLinear)]
        linear = next((module for module in packed if gives(module, out.logits, done.hidden)), None)
        if linear is None:
            return out
        try:
            head = Head(*read_norm("norm", step.norm), linear)
        except (NoMatchError, ValueError):  # another norm, whose own module computes it
            return out
        parts = nn.ModuleList([step.norm, linear])
        self._learnt = _Learnt(head, parts, Watch([parts], None), type(out), Glance(model))
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenStep:
        return TokenStep(memo[id(self._model())], None)

    def __reduce__(self) -> tuple:
        return TokenStep, (self._model(), None)


def install_token_step(model: nn.Module, decoder: nn.Module) -> None:
    """Let the module of ``model`` that holds this decoder and a packed head compute its decode steps the short way."""
    for module in model.modules():
        children = list(module.children())
        if any(child is decoder for child in children) and any(isinstance(child, PackedLinear) for child in children):
            if hasattr(module, "config") and "forward" not in module.__dict__:
                module.__dict__["forward"] = TokenStep(module, decoder)
            return


def _hooked(decoder: nn.Module) -> bool:
    """Whether somebody waits for the decoder's call."""
    before = decoder._forward_pre_hooks.values()
    return bool(decoder._forward_hooks) or not all(getattr(hook, "changes_nothing", False) for hook in before)
