"""All layers of a decoder as one operator, for the few tokens of a decode step.

The call of the first layer computes all of them; the calls of the others, which the decoder makes one after another,
hand the result on. That is right only while the decoder does nothing between its layers but pass on what it got. So
it begins after a step in which every layer was called on the very tensor that the layer before returned, with the same
mask, position embeddings and cache; and every later call looks that this is still so.
"""

from __future__ import annotations

import inspect
import operator
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from .layer_program import Embedding, Head, Program, Stack, Sums, fitting, run_all
from .layer_watch import wait

MOST_TOKENS = 8  # of a sequence in one step; beyond, the operators' own cost does not matter
BUFFERS = "_stack_buffers"  # attribute of a cache: a _Buffers
_DEPTH = 12  # frames between a layer's forward and its decoder's


@dataclass(frozen=True)
class Seen:
    """A step in which the decoder passed each layer what the one before returned.

    x: of the first layer; calls: (mask, position embeddings) of every program; y: of the last layer.
    """

    x: Tensor
    calls: tuple[tuple[Any, Any], ...]
    y: Tensor


@dataclass(frozen=True)
class _Buffers:
    """The memory of a cache that a stack writes its tokens to.

    whose: the handles of the stack's programs; rotary: see :func:`ops.layers_forward`; room: in tokens; keys: of each
    layer; all: in the operators' order; stack: with them, where no sums come from other ranks.
    """

    whose: list[int]
    rotary: list[int]
    room: int
    keys: list[Tensor]
    all: list[Tensor]
    stack: Stack | None


def forget_buffers(cache: Any) -> None:
    """Let go of the memory that a stack has written the tokens of ``cache`` to."""
    cache.__dict__.pop(BUFFERS, None)


class _Step(threading.local):
    """One thread's way through the layers."""

    out: Tensor | None = None  # what the first layer's call has computed for all of them
    frame: int = 0  # the decoder's call that it belongs to
    shared: tuple[Any, ...] = ()  # mask, position embeddings and cache of that call
    seen: Tensor | None = None  # while looking: what the layer before returned
    first: Tensor | None = None  # while looking: what the first layer got
    calls: tuple[tuple[Any, Any], ...] = ()  # while looking: (mask, position embeddings) of the programs so far
    last: Seen | None = None  # the last step that was looked at from end to end
    ends: list[Tensor] | None = None  # within last_of_prompt
    only: bool = False  # the same


class LayerStack:
    """The layers of one decoder, of which this process computes those at ``places``.

    programs: their runs that read one input. bypass: see :func:`layer_group.combine`. alike: whether the
    layers may be called with one mask and the same position embeddings; those of others are known to
    :class:`layer_decoder.DecoderStep` alone. sums: over ranks, if any.
    """

    def __init__(
        self,
        owner: nn.Module,
        layers: list[nn.Module],
        programs: list[list[Program]],
        bypass: int,
        alike: bool,
        places: list[int],
        sums: Sums | None = None,
    ) -> None:
        self._waiting = [each for layer in layers for each in (layer._forward_hooks, layer._forward_pre_hooks)]
        self._programs = [each for run in programs for each in run]  # their handles are good as long as they live
        self._handles = [program.handle for program in self._programs]
        self._groups, self._bypass, self._alike = [len(run) for run in programs], bypass, alike
        self._places, self._sums = places, sums
        self._one_rotary, self._no_rotary = [0, 1] * len(self._programs), [-1] * 2 * len(self._programs)
        self._last = len(layers) - 1
        self._code = inspect.unwrap(type(owner).forward).__code__
        self._step = _Step()
        self._may_run = False

    # ---- looking ----------------------------------------------------------------------------------------------------

    def look(self, index: int, x: Tensor, y: Tensor, shared: tuple[Any, ...]) -> None:
        """Layer ``index`` has just computed y from x on its own: allow the stack after a whole step like that."""
        step = self._step
        if index == 0:
            step.frame = self._frame() if x.shape[1] <= MOST_TOKENS else 0
            step.seen, step.shared, step.last = (y, shared, None) if step.frame else (None, (), None)
            step.first, step.calls = x, (shared[:2],)
        elif step.seen is x and shared[2] is step.shared[2]:
            step.seen = y
            step.calls += (shared[:2],) if index in self._places else ()
            if index == self._last:
                one = all(all(map(operator.is_, call, step.shared)) for call in step.calls)
                self._may_run = self._may_run or (one and self._alike)
                step.last = Seen(cast("Tensor", step.first), step.calls, y)
                step.seen, step.shared, step.first, step.calls = None, (), None, ()
        else:
            step.seen, step.shared, step.first, step.calls = None, (), None, ()

    def _frame(self) -> int:
        """The id of the decoder's call that this thread is in, 0 if a layer was called by somebody else."""
        frame: FrameType | None = sys._getframe(2)
        for _ in range(_DEPTH):
            if frame is None:
                break
            if frame.f_code is self._code:
                return id(frame)
            frame = frame.f_back
        return 0

    # ---- prompts ----------------------------------------------------------------------------------------------------

    @contextmanager
    def last_of_prompt(self, only: bool) -> Iterator[list[Tensor]]:
        """Within, the last layer of this thread's prompts puts what it returns for the last token into the list.

        only: it computes that token alone, where it can, and returns it in every token's place.
        """
        step = self._step
        ends: list[Tensor] = []
        before = step.ends, step.only
        try:
            step.ends, step.only = ends, only
            yield ends
        finally:
            step.ends, step.only = before

    def compute(self, index: int, run: Any, ready: tuple[Tensor, Any, Any, Any, Any]) -> Tensor:
        """``run(*ready)``, layer ``index`` on its own; see :meth:`last_of_prompt`."""
        step = self._step
        if step.ends is None or index != self._last:
            return run(*ready)
        y = run.last(*ready) if step.only and isinstance(run, Program) else None
        whole = run(*ready) if y is None else y.expand(ready[0].shape).contiguous()  # it may be written to
        step.ends.append(whole[:, -1:].clone())
        return whole

    # ---- running ----------------------------------------------------------------------------------------------------

    def begin(
        self,
        unchanged: Any,
        x: Tensor,
        rotary: tuple[Tensor | None, Tensor | None],
        shared: tuple[Any, ...],
    ) -> Tensor | None:
        """The output of all layers, or None if each has to be called. shared: (mask, position embeddings, cache).

        unchanged: a function that tells whether all programs are still those of their layers.
        """
        step = self._step
        step.out, step.shared = None, ()
        if not self._may_run or x.shape[1] > MOST_TOKENS or x.dim() != 3:
            return None
        frame = self._frame()
        if not frame:
            return None
        mask, cache, count = shared[0], shared[2], len(self._programs)
        angles = [t for t in rotary if t is not None]
        y = self.run(unchanged, x, angles, self._one_rotary if angles else self._no_rotary, mask, cache)
        if y is not None:
            step.out, step.frame, step.shared, step.last = y, frame, shared, Seen(x, (shared[:2],) * count, y)
        return y

    def run(
        self,
        unchanged: Any,
        x: Tensor,
        angles: list[Tensor],
        rotary: list[int],
        mask: Tensor | None,
        cache: Any,
        head: Head | None = None,
        embedding: Embedding | None = None,
        first: int = -1,
    ) -> Tensor | None:
        """The output of all layers, or what ``head`` makes of it; None if each has to be called.

        unchanged: as in :meth:`begin`. The rest: see :class:`layer_program.Stack`; without :attr:`is_whole` there are
        neither head nor embedding and first is -1.
        """
        if self.hooked() or not unchanged():
            return None
        ready = self._reserve(cache, x, rotary, x.dtype if embedding is None else embedding.dtype)
        if ready is None:
            return None
        held, buffers, length = ready
        mask = fitting(mask, length + x.shape[1])
        if buffers.stack is not None:
            y = buffers.stack(x, angles, mask, length, head, embedding, first)
        else:
            tensors = angles if mask is None else [*angles, mask]
            masks = [-1 if mask is None else len(angles)] * len(self._programs)
            arguments = (self._handles, x, tensors, rotary, masks, buffers.all, length, self._groups, self._bypass)
            y = run_all(arguments, self._sums)
        length += x.shape[1]
        for each in held:
            each.length = length  # advance() would look again whether there is room
        return y

    @property
    def is_whole(self) -> bool:
        """Whether embedding and head may be in the operator: nothing is summed over ranks."""
        return self._sums is None

    def take_last(self) -> Seen | None:
        """This thread's last step that was looked at from end to end, once."""
        last, self._step.last = self._step.last, None
        return last

    def length_of(self, cache: Any) -> int:
        """Tokens in a cache that this stack can write; -1 for any other."""
        held = getattr(cache, "layers", None)
        return getattr(held[0], "length", -1) if held and len(held) == self._last + 1 else -1

    def resume(self, index: int, x: Any, shared: tuple[Any, ...]) -> Tensor | None:
        """The output of all layers if the first one's call has computed them, else None.

        RuntimeError if the decoder did something else between its layers than before.
        """
        step = self._step
        y = step.out
        if y is None:
            return None
        if x is y and all(map(operator.is_, shared, step.shared)):
            if index == self._last:
                step.out, step.shared = None, ()
            return y
        step.out, step.shared = None, ()
        if self._frame() != step.frame:  # a step before this one was given up
            return None
        self._may_run = False
        raise RuntimeError(
            f"the model changed what it passes from layer to layer at layer {index}, after steps in which it did not; "
            "this step's result would be wrong. Run it again: its layers are now called one by one"
        )

    def hooked(self) -> bool:
        """Whether somebody waits for the call of a layer."""
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return True
        return any(self._waiting) and wait(self._waiting)

    def _reserve(
        self, cache: Any, x: Tensor, rotary: list[int], dtype: torch.dtype
    ) -> tuple[list[Any], _Buffers, int] | None:
        """(layers of the cache, their memory, length), or None if it cannot be written. dtype: of the layers' x."""
        held = getattr(cache, "layers", None)
        if held is None or len(held) != self._last + 1:
            return None
        held = [held[place] for place in self._places]
        try:
            length = held[0].length
            if any(each.length != length for each in held):
                return None
            buffers = cache.__dict__.get(BUFFERS)
            if (
                buffers is None
                or buffers.whose is not self._handles
                or buffers.rotary is not rotary
                or length + x.shape[1] > buffers.room
                or x.shape[0] != buffers.keys[0].shape[0]
                or not all(map(operator.is_, [each.k for each in held], buffers.keys))
            ):
                buffers = cache.__dict__[BUFFERS] = self._make(
                    held, x.new_empty((*x.shape[:2], 0), dtype=dtype), rotary
                )
        except AttributeError:  # a cache of another make
            return None
        return held, buffers, length

    def _make(self, held: list[Any], x: Tensor, rotary: list[int]) -> _Buffers:
        """The memory of these layers of a cache, with room for x's tokens."""
        made = [program.reserve(each, x) for program, each in zip(self._programs, held, strict=True)]
        buffers = [t for each in made for t in each[:4] if t is not None]
        keys = [each[0] for each in made]
        stack = None
        if self._sums is None:
            stack = Stack(self._handles, buffers, rotary, self._groups, self._bypass)
        return _Buffers(self._handles, rotary, min(key.shape[2] for key in keys), keys, buffers, stack)
