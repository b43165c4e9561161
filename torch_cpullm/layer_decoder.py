"""A decode step of a whole decoder: embedding, positions, all layers and the last norm, without the code in between.

transformers' own code between the embedding and the last norm (masks, recorded outputs, a call per layer) takes longer
than the weights of a small model. It is left out after a step in which it was seen to do nothing else: the first layer
got the embedding of the tokens, position embeddings were those of a module of the decoder, no mask hid more than a
layer's window does, and the result was the last norm of what the layers returned, all bit for bit. Any other call goes
through the class's forward.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layer_angles import Angles, position_of
from .layer_program import Embedding, Head
from .layer_spec import IGNORED
from .layer_stack import LayerStack, Seen
from .layer_watch import Glance
from .linear import PackedEmbedding
from .ops import recording

_TAKEN = {"input_ids", "attention_mask", "position_ids", "past_key_values", *IGNORED}
# Arguments that may have these values: they change nothing in a decode step.
_HARMLESS = {"use_cache": (None, True), "return_dict": (None, True)}
TRIES = 8  # steps in a row that may be looked at in vain: a model that never is the same twice costs no more
_OFF = (None, False)  # what any other argument must be
# Settings of a config that change what a decoder returns, not what its layers compute.
SETTINGS = ("output_hidden_states", "_output_attentions", "output_attentions", "return_dict", "use_cache", "is_causal")


@dataclass(frozen=True)
class _Learnt:
    """The modules of a decoder that a step needs beside its layers, and the class of its result.

    rows: the embedding's, where the operator can take them; positions: of each kind of position embeddings; rotary: see
    :class:`layer_program.Stack`.
    """

    embedding: nn.Module
    rows: Embedding | None
    positions: tuple[Angles, ...]
    rotary: list[int]
    norm: nn.Module
    kind: type
    glance: Glance


@dataclass(frozen=True)
class Done:
    """A step that went the short way: its arguments and result."""

    kwargs: dict[str, Any]
    hidden: Tensor


class _Last(threading.local):
    """A thread's last step that went the short way, where somebody wants it: it holds the cache."""

    wanted: bool = False
    done: Done | None = None


class DecoderStep:
    """``forward`` of one decoder instance. Holds no strong reference to it, so that a deleted model is gone at once."""

    def __init__(
        self, owner: nn.Module, stack: LayerStack | None, unchanged: Callable[[], bool], windows: list[int]
    ) -> None:
        self._owner = weakref.ref(owner)
        self._original = type(owner).forward
        self._names = list(inspect.signature(self._original).parameters)[1:]
        self._stack = stack  # None: of a copied decoder, which computes by its class's forward
        self._unchanged = unchanged  # whether the programs of the stack are still those of the layers
        self._windows = windows
        self._learnt: _Learnt | None = None
        self._tries = TRIES
        self._last = _Last()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward: arguments and result are those of its class."""
        owner = self._owner()
        stack = self._stack
        if stack is None or recording():
            return self._original(owner, *args, **kwargs)
        named = dict(zip(self._names, args, strict=False)) | kwargs
        if len(named) != len(args) + len(kwargs) or self.plain(named) != 1:
            return self._original(owner, *args, **kwargs)
        return self._decode(owner, stack, named)

    def _decode(self, owner: Any, stack: LayerStack, kwargs: dict[str, Any]) -> Any:
        """A plain decode step, the short way or, where that is not learnt yet, the class's."""
        if self._learnt is not None:
            out = self._run(owner, stack, self._learnt, kwargs)
            return self._original(owner, **kwargs) if out is None else out
        if not self._tries:
            return self._original(owner, **kwargs)
        stack.take_last()
        out = self._original(owner, **kwargs)
        seen = stack.take_last()
        if seen is not None:
            self._tries -= 1
            self._learn(owner, seen, kwargs, out)
        return out

    def plain(self, kwargs: dict[str, Any]) -> int:
        """Tokens per sequence of a call that asks for hidden states and a written cache; 0 where it is another."""
        for name, value in kwargs.items():
            allowed = _HARMLESS.get(name, _OFF)  # by identity: a value may be a tensor
            if name not in _TAKEN and value is not allowed[0] and value is not allowed[1]:
                return 0
        get = kwargs.get
        ids, mask, positions = get("input_ids"), get("attention_mask"), get("position_ids")
        if ids.__class__ is not Tensor or ids.dim() != 2 or positions.__class__ is not Tensor:
            return 0
        if get("past_key_values") is None or (mask is not None and (mask.__class__ is not Tensor or mask.dim() != 2)):
            return 0
        capturing = sys.modules.get("transformers.utils.output_capturing")
        return 0 if capturing is not None and capturing._active_collector.get() else ids.shape[1]

    # ---- learning ---------------------------------------------------------------------------------------------------

    def _learn(self, owner: Any, seen: Seen, kwargs: dict[str, Any], out: Any) -> None:
        """Take the short way from now on if ``out`` is what it would have given."""
        if getattr(out, "past_key_values", None) is not kwargs["past_key_values"]:
            return
        if {name for name, value in vars(out).items() if value is not None} != {"last_hidden_state", "past_key_values"}:
            return
        if not all(map(_is_no_mask, (mask for mask, _ in seen.calls), self._windows)):
            return
        embeddings = [m for m in children(owner) if isinstance(m, (nn.Embedding, PackedEmbedding))]
        embedding = next((m for m in embeddings if gives(m, seen.x, kwargs["input_ids"])), None)
        norm = next((m for m in children(owner) if gives(m, out.last_hidden_state, seen.y)), None)
        pairs: list[Any] = []  # the different position embeddings
        for _, pair in seen.calls:
            if pair is not None and not any(pair is other for other in pairs):
                pairs.append(pair)
        kinds = sorted(set(getattr(owner.config, "layer_types", None) or ()))
        ways = [(m, extra) for extra in ((), *((kind,) for kind in kinds)) for m in children(owner)]
        given = (seen.x, kwargs["position_ids"])
        found = [next((way for way in ways if gives(way[0], pair, *given, *way[1])), None) for pair in pairs]
        if embedding is None or norm is None or None in found:
            return
        rotary: list[int] = []  # of every layer: the places of its cosines and sines
        for _, pair in seen.calls:
            place = next((i for i, other in enumerate(pairs) if other is pair), -1)
            rotary += [2 * place, 2 * place + 1] if place >= 0 else [-1, -1]
        positions = tuple(Angles(*way) for way in found if way is not None)
        rows = _rows_of(embedding) if self.is_whole else None
        self._learnt = _Learnt(embedding, rows, positions, rotary, norm, type(out), Glance(owner, SETTINGS))

    # ---- running ----------------------------------------------------------------------------------------------------

    def _run(self, owner: Any, stack: LayerStack, learnt: _Learnt, kwargs: dict[str, Any]) -> Any:
        """The result of a decode step, or None if the class's forward has to compute it."""
        y = self._layers(owner, stack, learnt, kwargs)
        if y is None:
            return None
        hidden = learnt.norm(y)
        if self._last.wanted and hidden.dtype == y.dtype:  # the operator's logits have y's
            self._last.done = Done(kwargs, hidden)
        return learnt.kind(last_hidden_state=hidden, past_key_values=kwargs["past_key_values"])

    def _layers(
        self, owner: Any, stack: LayerStack, learnt: _Learnt, kwargs: dict[str, Any], head: Head | None = None
    ) -> Tensor | None:
        """What the last layer returns in a decode step, or what ``head`` makes of it; None as of :meth:`_run`."""
        cache, mask = kwargs["past_key_values"], kwargs.get("attention_mask")
        if not learnt.glance.same(owner):
            self._learnt = None  # to be learnt again from the next steps
            return None
        length = stack.length_of(cache)
        if length < 0 or (mask is not None and (mask.shape[1] != length + 1 or not bool(mask.all()))):
            return None
        x, angles, rows, first = _inputs(learnt, kwargs["input_ids"], kwargs["position_ids"])
        self._tries = TRIES  # what was learnt holds
        return stack.run(self._unchanged, x, angles, learnt.rotary, None, cache, head, rows, first)

    # ---- for a step of the whole model ------------------------------------------------------------------------------

    @property
    def norm(self) -> nn.Module | None:
        """The last norm, once it is known."""
        return None if self._learnt is None else self._learnt.norm

    @property
    def is_whole(self) -> bool:
        """Whether :meth:`logits` may be called."""
        return self._stack is not None and self._stack.is_whole

    def logits(self, owner: nn.Module, kwargs: dict[str, Any], head: Head, norm: nn.Module) -> Tensor | None:
        """What ``head``, read from this last norm, makes of a plain call of the decoder; None if the classes' forwards
        have to compute it.
        """
        stack, learnt = self._stack, self._learnt
        if stack is None or learnt is None or learnt.norm is not norm:
            return None
        return self._layers(owner, stack, learnt, kwargs, head)

    def prompts(self) -> LayerStack | None:
        """The stack, if its last layer may be told to compute a prompt's last token alone."""
        stack = self._stack
        return stack if stack is not None and stack.is_whole and not stack.hooked() and self._unchanged() else None

    def want_done(self) -> None:
        """Keep this thread's next step for :meth:`take_done`."""
        self._last.wanted, self._last.done = True, None

    def take_done(self) -> Done | None:
        """This thread's step since :meth:`want_done`, if it went the short way."""
        done, self._last.wanted, self._last.done = self._last.done, False, None
        return done

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderStep:
        return DecoderStep(memo[id(self._owner())], None, bool, [])

    def __reduce__(self) -> tuple:
        return _inert, (self._owner(),)


def _inert(owner: nn.Module) -> DecoderStep:
    """What a copied decoder has in the place of its DecoderStep: the class's forward."""
    return DecoderStep(owner, None, bool, [])


def children(owner: nn.Module) -> Iterator[nn.Module]:
    """The modules beside the list of layers."""
    return (module for module in owner.children() if not isinstance(module, nn.ModuleList))


def _rows_of(embedding: nn.Module) -> Embedding | None:
    """The rows of an embedding that is no more than that."""
    if embedding.__class__ is not PackedEmbedding:
        return None
    try:
        return Embedding(embedding)
    except ValueError:
        return None


def _inputs(learnt: _Learnt, ids: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor], Embedding | None, int]:
    """(x, angles, embedding, first) of a step, see :class:`layer_program.Stack`: from the ids on where it can be."""
    rows = learnt.rows
    if rows is not None and rows.is_all_of(learnt.embedding):
        position = position_of(positions)
        found = [] if position is None else [each.find(position, rows.dtype) for each in learnt.positions]
        tables = [each for each in found if each is not None]
        if len(tables) == len(learnt.positions) and len({first for _, first in tables}) == 1:
            return ids, [t for made, _ in tables for t in made], rows, tables[0][1]
    x = learnt.embedding(ids)
    return x, [t for each in learnt.positions for t in each(x, positions)], None, -1


def _is_no_mask(mask: Any, window: int) -> bool:
    """Whether a layer with this window (0: none) computes the same without ``mask``, of one query and all keys."""
    if mask is None:
        return True
    if mask.__class__ is not Tensor or mask.dim() != 4 or mask.shape[2] != 1:
        return False
    keys = mask.shape[3]
    seen = mask if mask.dtype == torch.bool else mask == 0
    return bool((seen == (torch.arange(keys) >= keys - (window or keys))).all())


def gives(module: nn.Module, result: Any, *args: Any) -> bool:
    """Whether ``module(*args)`` is ``result``, bit for bit."""
    try:
        made = module(*args)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError):  # it is for other arguments
        return False
    made, result = (each if isinstance(each, tuple) else (each,) for each in (made, result))
    return len(made) == len(result) and all(
        isinstance(a, Tensor) and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(made, result, strict=True)
    )
