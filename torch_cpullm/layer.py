"""Runs decoder layers as programs: one operator per layer, inside the model as it is.

``layer.forward`` is overridden on the instance; class, submodules and hooks stay. Every call looks whether the layer is
still what was matched and whether a program can serve the call, and otherwise goes through the class's own forward.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layer_cut import added_by
from .layer_decoder import DecoderStep
from .layer_execute import Run
from .layer_graph import decoder_layer, number_layer
from .layer_group import Call, Elsewhere, GroupMember, member_of
from .layer_match import Decoder, Match, decoders, match_layer
from .layer_parts import ALIBI, RotaryTable, biased_mask
from .layer_program import MOST_MEMBERS, Program, run_group, sums_of
from .layer_spec import IGNORED
from .layer_stack import LayerStack
from .layer_token import TokenStep, install_token_step
from .layer_watch import Watch, written
from .ops import recording

ONE_OP, TWO_OPS, GROUP_OP, PER_LINEAR = "one op", "two ops", "one op per group", "per-linear ops"
IN_TORCH = "a group in plain torch"

# Arguments that may have any value: a program computes with them, or they do not change what a layer computes.
_FREE = {
    "attention_mask",
    "position_embeddings",
    "position_ids",
    "use_cache",
    "cache_position",
    "output_hidden_states",
    "return_dict",
    *IGNORED,
}


def install_programs(model: nn.Module) -> list[Match]:
    """Run every decoder layer of ``model`` that a program can compute as one; returns what became of each.

    The linears must be packed. A second call looks at all layers again. :func:`remove_programs` undoes it.
    """
    remove_programs(model)
    matches = []
    rotaries: list[RotaryTable] = []
    for decoder in decoders(model):
        found: list[Match] = []
        for index, layer in enumerate(decoder.layers):
            member = member_of(layer)
            if "forward" in layer.__dict__ and (member is None or not member.grouped):
                reason = "its forward was replaced on the instance" if member is None else "a CQIL plan skips it"
                match = Match(f"{decoder.name}.{index}", None, reason)
            else:
                match = match_layer(decoder, index)
            found.append(match)
        matches += found
        for index, layer in enumerate(decoder.layers):
            match, member = found[index], member_of(layer)
            if member is not None and isinstance(layer, Elsewhere):  # is called as the members here are
                twin = found[member.group.first + member.group.here[0]]
                match = replace(twin, name=match.name, reason=match.reason, run=None)
            if match.spec is not None:
                layer.__dict__["forward"] = None  # it is there when the layer is looked at
                layer.__dict__["forward"] = LayerProgram(layer, decoder, index, match, rotaries, member)
        for layer in decoder.layers:
            program = layer.__dict__.get("forward")
            if isinstance(program, LayerProgram) and program.member is not None:
                program._together = program.why_not_together() == ""
        _stack_up(model, decoder)
    model.__dict__["_cpullm_layers"] = {match.name: match.reason for match in matches}
    return matches


def _stack_up(model: nn.Module, decoder: Decoder) -> None:
    """Let the layers of a decoder run as one operator in decode steps, where they are all alike and programs."""
    found = [layer.__dict__.get("forward") for layer in decoder.layers]
    all_ = [each for each in found if isinstance(each, LayerProgram) and (each._run is not None or each.away)]
    programs = [each for each in all_ if not each.away]
    alike = {(each._rotary is None, each._cache_name, each._needs_mask) for each in programs}
    groups = [each.member.group for each in programs if each.member is not None]
    places, windows = [each._index for each in programs], [each.window for each in programs]
    in_place = all(each._layer_idx == each._index for each in programs)
    if len(all_) != len(found) or len(programs) < 2 or len(alike) != 1 or not in_place:
        return
    if programs[0]._rotary is not None or any(each._alibi_heads for each in programs):  # what a step does not hand on
        return
    if not all(each._together for each in programs) or len({group.bypass for group in groups}) > 1:
        return
    if any(group.ranks is not group.inside for group in groups) or any(
        each.operators > 1 for each in programs
    ):  # sums between them that no operator makes
        return
    runs_of = [None if each.member is None else each.member.group for each in all_ if each.begins]
    layers, owner = list(decoder.layers), decoder.owner
    bypass = groups[0].bypass if groups else 0
    left = iter([cast("Program", each._run) for each in programs])
    runs = [[next(left) for _ in range(1 if group is None else len(group.here))] for group in runs_of]
    sums = sums_of(runs, [None if group is None else group.ranks for group in runs_of])
    stack = LayerStack(owner, layers, runs, bypass, len(set(windows)) == 1, places, sums)
    for each in all_:
        each._stack = stack
    first = all_[0]
    first._others, first._stack_watch = [weakref.ref(each) for each in all_], Watch(layers, owner.config)
    first._states, first._in_place = [each.__dict__ for each in all_[1:]], 0
    above, _, name = decoder.path.rpartition(".")
    first._listed = weakref.ref(owner.get_submodule(above)), name, weakref.ref(decoder.layers)
    if "forward" not in owner.__dict__:
        owner.__dict__["forward"] = DecoderStep(owner, stack, first._all_unchanged, windows)
    install_token_step(model, owner)


def remove_programs(model: nn.Module) -> None:
    """Undo :func:`install_programs`: every layer computes by its class's forward again."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, (LayerProgram, DecoderStep, TokenStep)):
            del module.__dict__["forward"]
        if isinstance(forward, LayerProgram) and forward.member is not None:
            module.__dict__["forward"] = forward.member
    model.__dict__.pop("_cpullm_layers", None)


def layer_levels(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """(name, level, reason) of every decoder layer that :func:`install_programs` looked at, as it is now.

    Of a model that it never looked at: of the layers in groups.
    """
    if "_cpullm_layers" not in model.__dict__:
        yield from ((name, IN_TORCH, "") for name, module in model.named_modules() if member_of(module) is not None)
    for name, reason in model.__dict__.get("_cpullm_layers", {}).items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:  # the layer is gone
            continue
        program, member = layer.__dict__.get("forward"), member_of(layer)
        if isinstance(program, LayerProgram):
            reason = program.why_not() or program.why_not_together()
        elif not reason:
            reason = "its forward was replaced"
        whole = ONE_OP if not isinstance(program, LayerProgram) or program.operators == 1 else TWO_OPS
        yield name, PER_LINEAR if reason else whole if member is None or whole == TWO_OPS else GROUP_OP, reason


def all_in_programs(model: nn.Module) -> bool:
    """Whether every decoder layer of ``model`` runs as an operator, as far as :func:`install_programs` can tell."""
    names = model.__dict__.get("_cpullm_layers", {})
    return bool(names) and all(level != PER_LINEAR and level != IN_TORCH for _, level, _ in layer_levels(model))


class LayerProgram:
    """The forward of one layer. Holds no strong reference to the layer, so that a deleted model is gone at once."""

    def __init__(
        self,
        layer: nn.Module,
        decoder: Decoder | None,
        index: int,
        match: Match | None = None,
        rotaries: list[RotaryTable] | None = None,
        member: GroupMember | None = None,
    ) -> None:
        self._layer = weakref.ref(layer)
        self._original = type(layer).forward
        self.member = member  # of a group, whose last member's call runs all
        self._together = member is None  # whether graphs may have an operator for each member
        self._decoder = None if decoder is None else (weakref.ref(decoder.owner), decoder.path, decoder.name)
        self._index = index
        self._rotaries = [] if rotaries is None else rotaries
        self._run: Run | None = None
        self._watch: Watch | None = None
        self._stack: LayerStack | None = None
        # Of the first layer of a stack: all its programs, the others' attributes, whether their layers are what they
        # were, where the list of them is (a module, its name there, itself), and what was written() when all was so.
        self._others: list[weakref.ref[LayerProgram]] = []
        self._states: list[dict[str, Any]] = []
        self._stack_watch: Watch | None = None
        self._listed: tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]] | None = None
        self._in_place = 0
        self._alibi_heads = 0
        self._reason = "not looked at yet"
        self._number = number_layer(self)
        if match is not None:
            self._set(layer, match)

    def _set(self, layer: nn.Module, match: Match) -> None:
        """Take over what matching found."""
        self._reason = match.reason
        self._watch = Watch([layer], match.config)
        self._run, self._stack = match.run, None
        self._outputs, self._cache_name, self._layer_idx = match.outputs, match.cache_name, match.layer_idx
        self._alibi_heads = match.spec.heads if match.spec is not None and match.biased else 0  # whose scores get alibi
        self._known = _FREE | {match.cache_name} | ({ALIBI} if self._alibi_heads else set())
        capturing = sys.modules.get("transformers.utils.output_capturing")
        self._collector = None if capturing is None else capturing._active_collector
        spec = match.spec
        self._kind = None if spec is None else (spec.hidden, spec.o.compute, spec.parallel)
        self._rotates = spec is not None and spec.rotary_dim > 0
        self.window = 0 if spec is None else spec.window
        self._needs_mask = getattr(match.config, "_attn_implementation", None) == "eager"
        self._rotary = None if match.table is None else RotaryTable.of(match.table, self._rotaries)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward: arguments and result are those of its class."""
        if torch.compiler.is_compiling():
            return self._traced(args, kwargs)
        if recording():
            return self._plain(args, kwargs)
        stack = self._stack
        if stack is not None and len(args) == 1:
            done = self._with_others(stack, args[0], kwargs)
            if done is not None:
                return done if not self._outputs else (done, *[None] * (self._outputs - 1))
        if self.member is not None:
            return self._as_member(self.member, args, kwargs)
        ready = self._ready(args, kwargs)
        if ready is None:
            return self._plain(args, kwargs)
        run = cast("Run", self._run)
        y = run(*ready) if stack is None else stack.compute(self._index, run, ready)
        if stack is not None:
            stack.look(self._index, ready[0], y, self._shared(kwargs))
        return y if not self._outputs else (y, *[None] * (self._outputs - 1))

    def _plain(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The layer's result without its program."""
        if self.member is not None:
            return self.member(*args, **kwargs)
        return self._original(cast("nn.Module", self._layer()), *args, **kwargs)

    def _as_member(self, member: GroupMember, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of a member of a group: its input, but for the last one's."""
        x, kwargs = member.named(args, kwargs)
        calls = member.group.collect(member.index, x, kwargs)
        y = x if calls is None else self._run_group(calls)
        if self._stack is not None:
            self._stack.look(self._index, x, y, self._shared(kwargs))
        return member.wrapped(y)

    def _run_group(self, calls: list[Call]) -> Tensor:
        """The output of this program's group, by one operator or in plain torch."""
        group, programs = cast("GroupMember", self.member).group, self._of_group()
        if len(programs) == len(group.here) <= MOST_MEMBERS:
            own = [calls[i] for i in group.here]
            ready = [each._ready((x,), kwargs) for each, (x, kwargs) in zip(programs, own, strict=True)]
            if None not in ready and len({each._kind for each in programs}) == 1:
                runs = [cast("Program", each._run) for each in programs]
                inside = group.inside
                if group.is_cut and inside is None:
                    return group.summed(own[0][0], added_by(runs, ready))
                y = run_group(runs, group.bypass, cast("list[tuple]", ready), inside)
                if y is not None:
                    return y if inside is not None else group.joined(own[0][0], y)
        return group.compute(calls)

    def _of_group(self) -> list[LayerProgram]:
        """The programs of the members here of this program's group; fewer than those where some have none."""
        group = cast("GroupMember", self.member).group
        members = group.members()
        found = [members[i].__dict__.get("forward") for i in group.here]
        return [each for each in found if isinstance(each, LayerProgram)]

    def why_not_together(self) -> str:
        """Why the group of this layer does not run as one operator; empty if it does, and for a layer in none."""
        if self.member is None:
            return ""
        size, programs = len(self.member.group.here), self._of_group()
        if size > MOST_MEMBERS:
            return f"groups of more than {MOST_MEMBERS} have no operator"
        if len(programs) < size or any(each.why_not() for each in programs):
            return "another layer of its group does not run as one operator"
        alike = len({each._kind for each in programs}) == 1
        return "" if alike else "the layers of its group compute in different ways"

    @property
    def operators(self) -> int:
        """Of a call that the program serves: 2 of a layer that is cut among ranks of several hosts."""
        if self.member is not None and self.member.group.is_cut:
            return 1 if self.member.group.ranks.inside else 2
        return getattr(self._run, "operators", 1)

    @property
    def away(self) -> bool:
        """Whether another rank computes the layer."""
        return self.member is not None and self.member.index not in self.member.group.here

    @property
    def begins(self) -> bool:
        """Whether the layer is in no group or the first of one."""
        return self.member is None or self.member.index == 0

    def _ready(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Any, Any, Any, Any] | None:
        """(x, cos, sin, mask, cache layer) of a call that the program can serve, else None."""
        watch, run = self._watch, self._run
        if (
            len(args) != 1
            or ((watch is None or run is None or not watch.unchanged()) and not self._look_again())
            or not (self._known.issuperset(kwargs) or self._harmless(kwargs))
        ):
            return None
        x, get = args[0], kwargs.get
        mask, cache, rotary = get("attention_mask"), get(self._cache_name), self._rotary
        usable = x.__class__ is Tensor and x.is_cpu and not (x.requires_grad and torch.is_grad_enabled())
        if self._alibi_heads:
            alibi = get(ALIBI)
            if not isinstance(mask, Tensor) or not isinstance(alibi, Tensor) or mask.dim() != 4:
                return None
            mask = biased_mask(mask, alibi, self._alibi_heads)
        elif mask is None:
            usable = usable and not (self._needs_mask and x.shape[1] > 1)
        elif mask.__class__ is not Tensor or mask.dim() != 4:
            usable = False
        if cache is not None:
            try:
                cache = cache.layers[self._layer_idx]
                cache.reserve  # noqa: B018  a cache of another make has none
            except (AttributeError, IndexError):
                usable = False
        cos = sin = None
        if rotary is not None:
            positions = get("position_ids")
            if positions is None:
                usable = False
            else:
                cos, sin = rotary(positions)
        elif self._rotates:
            cos, sin = get("position_embeddings") or (None, None)
            usable = usable and cos is not None and cos.dim() == 3  # 4: one per axis of a picture, which layers mix
        return (x, cos, sin, mask, cache) if usable else None

    def _shared(self, kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """What the layers of a stack are all called with."""
        get = kwargs.get
        return get("attention_mask"), get("position_embeddings"), get(self._cache_name)

    def _with_others(self, stack: LayerStack, x: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """The output of the whole stack where this call is part of one; None: the layer has to be computed."""
        shared = self._shared(kwargs)
        if self._index:
            return stack.resume(self._index, x, shared)
        mask, rotary, _ = shared
        if (
            not (x.__class__ is Tensor and x.is_cpu and not (x.requires_grad and torch.is_grad_enabled()))
            or (mask is not None and (mask.__class__ is not Tensor or mask.dim() != 4))
            or (mask is None and self._needs_mask)
            or (rotary is None and self._rotates)
            or not (self._known.issuperset(kwargs) or self._harmless(kwargs))
        ):
            return None
        return stack.begin(self._all_unchanged, x, rotary or (None, None), shared)

    def _all_unchanged(self) -> bool:
        """Whether every program of the stack is still that of its layer."""
        watch, stack = self._stack_watch, self._stack
        if watch is None or self._listed is None or self._layer() is None or watch.waiting():
            return False
        holder, name, list_ = self._listed[0](), self._listed[1], self._listed[2]()
        if holder is None or list_ is None or holder._modules.get(name) is not list_:
            return False
        layers = list_._modules
        at = written((layers, *self._states)) + watch.written()
        if at == self._in_place:
            return True
        programs = [ref() for ref in self._others]
        if len(layers) != len(programs) or not watch.same():
            return False
        # In this order. transformers 5.0 wraps the forward of layers whose outputs it records.
        pairs = zip(programs, layers.values(), strict=True)
        if all(p is not None and p._stack is stack and layer.__dict__.get("forward") is p for p, layer in pairs):
            self._in_place = at
            return True
        return False

    def _traced(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What Dynamo sees: one operator, which calls this object again when it runs, or the class's forward."""
        cache = None if self._run is None else kwargs.get(self._cache_name)
        number = getattr(cache, "number", None)  # of a CpuLlmCache
        if (
            self._run is None
            or self._alibi_heads > 0
            or len(args) != 1
            or (cache is not None and number is None)
            or torch.compiler.is_exporting()
            or (args[0].requires_grad and torch.is_grad_enabled())
            or not self._harmless(kwargs)
            or self._is_recorded()
            or not self._together
            or (self.member is not None and self.member.group.ranks is not None)
        ):
            return self._plain(args, kwargs)
        get = kwargs.get
        y = decoder_layer(
            args[0],
            get("attention_mask"),
            get("position_embeddings"),
            get("position_ids"),
            get("cache_position"),
            number,
            get("use_cache"),
            self._number,
        )
        return y if not self._outputs else (y, *[None] * (self._outputs - 1))

    def _is_recorded(self) -> bool:
        """Whether transformers records more than hidden states: that happens in what Dynamo traces, or not at all."""
        wanted = getattr(self._collector, "global_var", None)  # set while Dynamo traces; it cannot trace a ContextVar
        return wanted is not None and any(name != "hidden_states" for name in wanted)

    def run_in_graph(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        position_ids: Tensor | None,
        cache_position: Tensor | None,
        cache: Any,
        use_cache: bool | None,
    ) -> Tensor:
        """The layer's output, from the arguments that :meth:`_traced` gave to the operator."""
        kwargs: dict[str, Any] = {"attention_mask": mask}
        optional = {
            "position_embeddings": rotary,
            "position_ids": position_ids,
            "cache_position": cache_position,
            self._cache_name: cache,
            "use_cache": use_cache,
        }
        kwargs.update((name, value) for name, value in optional.items() if value is not None)
        y = self(x, **kwargs)
        y = y if isinstance(y, Tensor) else y[0]
        return y.clone() if y is x else y.contiguous()  # an operator's result is new memory, as the graph expects it

    def _harmless(self, kwargs: dict[str, Any]) -> bool:
        """Whether the arguments that a program does not know are switched off."""
        return all(value is None or value is False or name in self._known for name, value in kwargs.items())

    @torch._disable_dynamo  # the model may be compiled, with this layer outside of its graphs
    def _look_again(self) -> bool:
        """Whether the program may run after all: the layer has changed, or its modules have hooks."""
        layer, watch = self._layer(), self._watch
        if layer is None or layer.training:
            return False
        if watch is None or not watch.same():
            decoder = self._find()
            if decoder is None:
                self._run, self._reason = None, "it is not where its model had it"
                return False
            self._set(layer, match_layer(decoder, self._index))
            watch = cast("Watch", self._watch)
        return self._run is not None and not watch.hooked()

    def _find(self) -> Decoder | None:
        """The decoder, if it still holds this layer."""
        owner = self._decoder[0]() if self._decoder is not None else None
        if owner is None or self._decoder is None:
            return None
        try:
            layers = cast("nn.ModuleList", owner.get_submodule(self._decoder[1]))
            held = layers[self._index] is self._layer()
        except (AttributeError, IndexError):
            return None
        return Decoder(owner, self._decoder[1], self._decoder[2], layers) if held else None

    def why_not(self) -> str:
        """Why the layer does not run as one operator now; empty if it does."""
        if self._watch is None or not self._watch.unchanged():
            if self._look_again():
                return ""
            layer = self._layer()
            if layer is not None and layer.training:
                return "it is in training mode"
            return self._reason or "modules inside have forward hooks"
        return self._reason

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerProgram:
        """A program of the copied layer, which is matched when it is first called."""
        revive, (layer, owner, *rest, member) = self.__reduce__()
        return revive(memo.get(id(layer)), memo.get(id(owner)), *rest, copy.deepcopy(member, memo))

    def __reduce__(self) -> tuple:
        owner = self._decoder[0]() if self._decoder is not None else None
        return _revive, (self._layer(), owner, *(self._decoder or ("", "", ""))[1:], self._index, self.member)


def _revive(
    layer: nn.Module, owner: nn.Module | None, path: str, name: str, index: int, member: GroupMember | None
) -> LayerProgram:
    decoder = None if owner is None else Decoder(owner, path, name, nn.ModuleList())
    return LayerProgram(layer, decoder, index, member=member)
