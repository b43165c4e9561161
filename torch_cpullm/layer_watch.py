"""Whether layers are still what they were when they were matched."""

from __future__ import annotations

import itertools
import operator
import sys
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .layer_match import IRRELEVANT
from .layer_parts import own_state
from .linear import PackedLinear, PackedModule

# dict -> a number that grows whenever the dict is written to, as Dynamo's guards use it. Where torch has none: a larger
# one every time, as if everything were written to between two looks.
_counted = itertools.count()
_version_of_dict = getattr(torch._C._dynamo.guards, "dict_version", lambda _: next(_counted))
_version_of = operator.attrgetter("_version")


def written(dicts: Iterable[dict], tensors: Iterable[Tensor] = ()) -> int:
    """A number that grows whenever one of these is written to.

    It says the same as a comparison of what they hold and touches one word of each: between two tokens all of that
    comes from memory. tensors: none made under inference_mode, which have no version.
    """
    return sum(map(_version_of_dict, dicts)) + sum(map(_version_of, tensors))


def unchanged(now: list[Any], seen: list[Any]) -> bool:
    """Whether these are the same objects, or numbers and texts of the same value.

    Another list or config of equal value is a change: nobody would see it when that is written to.
    """
    return len(now) == len(seen) and all(map(_same, now, seen))


def _same(now: Any, seen: Any) -> bool:
    return now is seen or (now.__class__ is seen.__class__ and isinstance(now, (int, float, str)) and now == seen)


class Watch:
    """Tells whether anything that the matches of layers were made from has changed: objects by identity, settings by
    value. ``config`` is that of all the layers. Not seen: writes through ``.data``, which count nowhere, and another
    ``__class__``.

    Holds no reference to the layers themselves, whose attributes hold the programs.
    """

    def __init__(self, layers: list[nn.Module], config: Any) -> None:
        inner = [module for layer in layers for path, module in layer.named_modules() if path]
        others = [module for module in inner if not isinstance(module, PackedLinear)]
        self._hooks = [hooks for module in inner for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._hooks_seen = self._no_hooks_at = -1  # numbers of hooks registered in the process
        self._dicts = [d for m in (*layers, *others) for d in (m._modules, m._parameters, m._buffers) if d]
        self._layers = [
            (weakref.ref(layer), ["training", *(name for name in own_state(layer) if name != "forward")])
            for layer in layers
        ]
        self._states = [(module.__dict__, list(own_state(module))) for module in others]
        self._weights = [t for module in others for t in module.parameters(recurse=False)]
        self._versioned = [t for t in self._weights if not t.is_inference()]  # those have no version
        self._config = {"": None} if config is None else vars(config)
        self._settings = [name for name in self._config if name not in IRRELEVANT]
        self._linears = [module for module in inner if isinstance(module, PackedLinear)]
        # So that no other gets their id.
        self._held = [(linear.packed, linear.bias, linear.order) for linear in self._linears]
        # The first layer's attributes hold what holds this.
        self._first, rest = weakref.ref(layers[0]), (layer.__dict__ for layer in layers[1:])
        self._watched = (*rest, *self._dicts, *(state for state, _ in self._states), self._config)
        self._written, self._changes = self.written(), PackedModule.changes
        self._seen, self._slow = self._look(), self._look_closely()

    def written(self) -> int:
        """A number that stays the same only while nothing changes, hooks aside; AttributeError once a layer is gone."""
        return PackedModule.changes + _version_of_dict(self._first().__dict__) + written(self._watched, self._versioned)

    def _look(self) -> list[Any]:
        """What is compared where something was written to."""
        own = [(cast("nn.Module", ref()).__dict__, names) for ref, names in self._layers]
        states = [*own, *self._states, (self._config, self._settings)]
        return [
            *chain.from_iterable(map(dict.values, self._dicts)),
            *map(len, self._dicts),
            *(len(state) for state, _ in (*own, *self._states)),
            *(state[name] for state, names in states for name in names),
            *map(_version_of, self._versioned),
        ]

    def _look_closely(self) -> list[Any]:
        """What is compared where packed modules have changed, in this model or another."""
        seen: list[Any] = [t.data_ptr() for t in self._weights]
        for linear in self._linears:
            seen += [id(linear.packed), id(linear.bias), id(linear.order)]
            seen += [linear.compute, linear.dtype, len(linear.__dict__)]
        return seen

    def same(self) -> bool:
        """Whether nothing has changed, hooks aside."""
        try:
            at = self.written()
            if at == self._written:
                return True
            changes = PackedModule.changes
            if changes != self._changes and self._look_closely() != self._slow:
                return False
            if not unchanged(self._look(), self._seen):
                return False
            self._written, self._changes = at, changes
            return True
        except (AttributeError, KeyError, RuntimeError, TypeError):  # another tensor, an attribute that is gone
            return False

    def unchanged(self) -> bool:
        """Whether nothing has changed and no hook waits inside."""
        return not self.waiting() and self.same()

    def waiting(self) -> bool:
        """Whether there is a hook inside; see :meth:`hooked`."""
        registered = RemovableHandle.next_id
        if registered == self._no_hooks_at:
            return False
        if any(self._hooks):
            return self.hooked()
        if registered == self._hooks_seen:  # in the call before this one: a hook has its number before it is in place
            self._no_hooks_at = registered
        self._hooks_seen = registered
        return False

    def hooked(self) -> bool:
        """Whether a hook inside waits for the module's call."""
        return wait(self._hooks)


def wait(hooks: Iterable[dict[int, Any]]) -> bool:
    """Whether any of these hooks waits for a call.

    transformers leaves hooks behind once outputs were asked for; they wait only while one of theirs is.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    wanted = None if capturing is None else capturing._active_collector.get()
    for hook in chain.from_iterable(each.values() for each in hooks):
        if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
            return True
        if wanted and hook.__closure__ and any(cell.cell_contents in wanted for cell in _texts(hook)):
            return True
    return False


_LEFT_OUT = ("forward", "generation_config")


class Glance:
    """Tells whether a module's attributes, its children and its config's settings are those of when it was made.

    ``forward`` is left out, and what only generate() reads. settings: names, None: all.
    """

    def __init__(self, module: nn.Module, settings: Iterable[str] | None = None) -> None:
        self._config, self._children, self._written = vars(module.config), module._modules, 0
        self._names = ["training", "config", *(name for name in own_state(module) if name not in _LEFT_OUT)]
        self._settings = None if settings is None else tuple(settings)
        self._seen = self._look(module)

    def _look(self, module: nn.Module) -> list[Any]:
        state, config = module.__dict__, self._config
        settings = config if self._settings is None else {name: config.get(name) for name in self._settings}
        children = module._modules
        return [len(state), *map(state.__getitem__, self._names), children, *_items(children), *_items(settings)]

    def same(self, module: nn.Module) -> bool:
        """Whether ``module`` is still what it was."""
        at = written((module.__dict__, self._children, self._config))
        if at == self._written:
            return True
        try:
            if not unchanged(self._look(module), self._seen):
                return False
        except KeyError:  # an attribute is gone
            return False
        self._written = at
        return True


def _texts(hook: Any) -> Iterator[Any]:
    """Cells of a hook's closure that hold text: among them the name of the output that it records."""
    return (cell for cell in hook.__closure__ if isinstance(cell.cell_contents, str))


def _items(of: dict) -> Iterator[Any]:
    return chain.from_iterable(of.items())
