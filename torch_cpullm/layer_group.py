"""Groups of consecutive decoder layers that read one input, in plain torch: what a CQIL plan makes of a model.

The decoder calls its layers as before, each with its own mask, position embeddings and cache slot. Every member but the
last hands its input on; the call of the last computes the group. So the loop of the model, ``layer_idx``, the cache and
masks that differ between kinds of layers stay as they are, and the members keep their names in the state dict.

Source: CQIL (Zou et al., ACL 2024) for grouping and bypass; Layer Parallelism (2502.02790) for mode "lp".
"""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layer_parts import RESIDUAL_SCALES, ROLE_OF, NoMatchError, norm_readings, own_state

MODES = ("cqil", "lp", "skip", "skip_attention")
"""cqil and lp group layers; skip drops layers, skip_attention their attention (baselines)."""

Call = tuple[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Halves:
    """How a decoder layer splits in two. Children are named, so that this fits the layer whatever becomes of them.

    ::

        a = scale * post_attention(attention(input(x)))
        sequential: h = x + a, y = h + m, m = scale * post_mlp(mlp(norm(h)))
        parallel:   y = x + (a + m), m = mlp(norm(x)) or mlp(input(x))

    attention, mlp: names of children, those of ``mlp`` one after the other. arguments: what attention takes of the
    layer's arguments; None: all. norms: role -> child. residual: the attribute that holds the scale, or "". sum_first:
    of a parallel layer, False: y = (x + a) + m. outputs: length of the tuple that the layer returns; 0: a tensor.
    adding: children that take the residual and add it themselves.
    """

    attention: str
    arguments: tuple[str, ...] | None
    mlp: tuple[str, ...]
    norms: tuple[tuple[str, str], ...]
    parallel: bool
    residual: str
    sum_first: bool
    outputs: int
    adding: tuple[str, ...] = ()

    def norm(self, layer: nn.Module, role: str, x: Tensor) -> Tensor:
        """x [.., hidden] through the norm of this role, where there is one."""
        for name, child in self.norms:
            if name == role:
                return getattr(layer, child)(x)
        return x

    def _nothing_to_add(self, child: str, x: Tensor) -> dict[str, Tensor]:
        """The argument of a half that would add the residual itself: here the sum is the group's."""
        return {"residual": torch.zeros_like(x)} if child in self.adding else {}

    def attend(self, layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """``a``: what the attention half adds to x [b, s, hidden]. kwargs: the other arguments of the layer."""
        if self.arguments is not None:
            kwargs = {name: value for name, value in kwargs.items() if name in self.arguments}
        attention = getattr(layer, self.attention)
        out = attention(self.norm(layer, "input", x), **kwargs, **self._nothing_to_add(self.attention, x))
        a = self.norm(layer, "post_attention", out[0] if isinstance(out, tuple) else out)
        return a * getattr(layer, self.residual) if self.residual else a

    def feed(self, layer: nn.Module, h: Tensor) -> Tensor:
        """``m``: what the MLP half adds when it reads h [b, s, hidden]."""
        shares = self.parallel and "mlp" not in dict(self.norms)
        out: Any = self.norm(layer, "input" if shares else "mlp", h)
        for name in self.mlp:
            out = getattr(layer, name)(out, **self._nothing_to_add(name, h))
        m = self.norm(layer, "post_mlp", out[0] if isinstance(out, tuple) else out)
        return m * getattr(layer, self.residual) if self.residual else m


def split(layer: nn.Module, x: Tensor, kwargs: dict[str, Any], result: Any) -> Halves:
    """The halves of ``layer``, tried out on a recorded call: ``layer(x, **kwargs)`` gave ``result``.

    Raises NoMatchError where no reading of its children computes that.
    """
    y = result[0] if isinstance(result, tuple) else result
    bound = {torch.float32: 1e-4, torch.float64: 1e-9}.get(x.dtype, 2e-2) * float((y - x).abs().max())
    found: list[tuple[float, Halves]] = []
    for halves in _readings(layer, len(result) if isinstance(result, tuple) else 0):
        try:
            a = halves.attend(layer, x, kwargs)
        except TypeError as error:  # any model's own code
            raise NoMatchError(f"its attention cannot be called by itself: {error}") from error
        got = combine([layer], [halves], x, [a], 0)
        if torch.equal(got, y):
            return halves
        found.append((float((got - y).abs().max().nan_to_num(torch.inf)), halves))
    best = min(found, key=lambda each: each[0], default=None)
    if best is None or best[0] > bound:
        raise NoMatchError("it does not compute x + attention + MLP")
    return best[1]


def _readings(layer: nn.Module, outputs: int) -> list[Halves]:
    """What the names of the layer's children allow, the likeliest first."""
    children = {name: module for name, module in layer.named_children() if not isinstance(module, nn.Dropout)}
    norms = [name for name in children if "norm" in name or name.startswith("ln_")]
    roles = {
        name: {ROLE_OF.get(path.rpartition(".")[2] or name) for path, _ in module.named_modules()}
        for name, module in children.items()
        if name not in norms
    }
    attention = [name for name, found in roles.items() if found & {"q", "qkv"}]
    if len(attention) != 1 or not norms:
        raise NoMatchError("it has no norms, or not one attention")
    rest = [name for name in roles if name != attention[0]]
    if {"up", "down"} <= {role for name in rest if name in ROLE_OF for role in roles[name]}:
        order = {"up": 0, "down": 2}
        rest.sort(key=lambda name: order.get(ROLE_OF.get(name, ""), 1))  # two linears, an activation between them
    elif len(rest) != 1:
        raise NoMatchError(f"its MLP is not one module: {', '.join(rest) or 'none'}")
    parameters = inspect.signature(type(children[attention[0]]).forward).parameters.values()
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    halves = {name: children[name] for name in (attention[0], *rest)}
    adding = [name for name, half in halves.items() if "residual" in inspect.signature(type(half).forward).parameters]
    state = own_state(layer)
    scales = [name for name in RESIDUAL_SCALES if isinstance(state.get(name), (int, float))]
    return [
        Halves(
            attention[0],
            None if everything else tuple(p.name for p in parameters),
            tuple(rest),
            reading,
            parallel,
            scale,
            parallel and order_,
            outputs,
            tuple(adding),
        )
        for reading, (parallel, order_), scale in itertools.product(
            norm_readings(norms), ((False, False), (True, True), (True, False)), [*scales, ""]
        )
    ]


def combine(layers: list[nn.Module], halves: list[Halves], x: Tensor, attended: list[Tensor], bypass: int) -> Tensor:
    """``y = x + sum_l (a_l + m_l)``, first all a_l, then all m_l in order; x, a_l [b, s, hidden].

    m_l reads x + a_l + the a_j of the ``bypass`` members before it, which the residual gets once; -1: x + all a_j.
    """
    y = x
    if halves[0].parallel:
        for layer, half, a in zip(layers, halves, attended, strict=True):
            m = half.feed(layer, x)
            y = (a + m) + y if half.sum_first else (y + a) + m
        return y
    for a in attended:
        y = y + a
    fed = []
    for i, (layer, half) in enumerate(zip(layers, halves, strict=True)):
        h = y
        if bypass >= 0:
            h = x + attended[i]
            for a in attended[max(0, i - bypass) : i]:
                h = h + a
        fed.append(half.feed(layer, h))
    for m in fed:
        y = y + m
    return y


class Elsewhere(nn.Module):
    """In the place of a member that another rank computes. It has the layer's plain attributes.

    arguments: names of those of the layer's forward, hidden states first.
    """

    why_no_program = "another rank computes it"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in own_state(layer).items() if name != "forward"})
        self.train(layer.training)
        self.arguments = tuple(inspect.signature(type(layer).forward).parameters)[1:]

    def forward(self, *_: Any, **__: Any) -> Any:
        """RuntimeError: only its group can be called."""
        raise RuntimeError("this layer is on another rank, and is no member of its group any more")


class _Step(threading.local):
    """One thread's calls of the members so far."""

    def __init__(self) -> None:
        self.calls: list[Call] = []


class LayerGroup:
    """Members ``first``, ``first + 1``, ... of a list of layers, one :class:`Halves` each; mode: one of MODES.

    ranks: a :class:`torch_cpullm.collective.Ranks` of a group whose members are spread over ranks, or over teams of
    them, which cut the members; None: all are here. Holds no strong reference to the layers, so that a deleted model is
    gone at once. It is copied and pickled with its model, unless it is spread; copied alone, a member cannot be called.
    """

    def __init__(
        self,
        layers: nn.ModuleList | None,
        first: int,
        halves: tuple[Halves, ...],
        mode: str,
        bypass: int,
        ranks: Any = None,
    ) -> None:
        self._layers: Any = (lambda: None) if layers is None else weakref.ref(layers)
        self.first, self.halves, self.mode = first, halves, mode
        self.bypass = -1 if mode == "lp" else bypass
        self.ranks = ranks
        # Members that this process computes.
        teams = 1 if ranks is None or ranks.team is None else ranks.team.size  # ranks of each
        self.here = (
            range(len(halves)) if ranks is None else range(ranks.rank // teams, len(halves), ranks.size // teams)
        )
        self._step = _Step()
        self._traced: list[Call] = []  # while Dynamo traces, which is one thread at a time

    @property
    def inside(self) -> Any:
        """The ranks, where operators make their sums; None where the group is not spread, or sums go through gloo."""
        return self.ranks if self.ranks is not None and self.ranks.inside else None

    @property
    def is_cut(self) -> bool:
        """Whether this rank has a share of each member here."""
        return self.ranks is not None and self.ranks.team is not None

    @property
    def size(self) -> int:
        """Members."""
        return len(self.halves)

    def members(self) -> list[nn.Module]:
        """The layers; RuntimeError where they are gone."""
        layers = self._layers()
        if layers is None:
            raise RuntimeError("a member of a CQIL group was taken out of its model and cannot be called alone")
        return [layers[i] for i in range(self.first, self.first + self.size)]

    def collect(self, index: int, x: Tensor, kwargs: dict[str, Any]) -> list[Call] | None:
        """Remember the call of one member; all calls when it is the last one's, else None.

        RuntimeError where the decoder did something else between two members than to pass on what it got.
        """
        tracing = torch.compiler.is_compiling()
        calls = self._traced if tracing else self._step.calls
        if index == 0:
            calls.clear()
        elif len(calls) != index or not (tracing or calls[-1][0] is x or torch.equal(calls[-1][0], x)):
            calls.clear()
            raise RuntimeError(
                f"layer {self.first + index} is a member of a CQIL group and must get what the layer before returned, "
                "right after it; torch_cpullm.cqil.restore(model) takes the groups apart"
            )
        if self.halves[index].outputs and kwargs.get("output_attentions"):
            raise ValueError("a CQIL group returns no attention weights: call with output_attentions=False")
        calls.append((x, kwargs))
        if index + 1 < self.size:
            return None
        done = list(calls)
        calls.clear()
        return done

    def compute(self, calls: list[Call]) -> Tensor:
        """The group's output from the calls of all members."""
        members, x = self.members(), calls[-1][0]
        layers, halves = [members[i] for i in self.here], [self.halves[i] for i in self.here]
        attended = [
            half.attend(layer, x, calls[i][1]) for i, layer, half in zip(self.here, layers, halves, strict=True)
        ]
        y = combine(layers, halves, x, attended, self.bypass)
        if not self.is_cut or self.ranks.team.rank == 0 or halves[0].parallel:
            return self.joined(x, y)
        # The first rank adds what the whole team has: attention, and an MLP's output that a norm has read.
        normed = any(role == "post_mlp" for half in halves for role, _ in half.norms)
        whole = y if normed else torch.stack([x, *attended]).float().sum(0)
        return self.summed(x, y.float() - whole.float())

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        """``x + sum over ranks of (y - x)``, y: what the members here make of x."""
        return y if self.ranks is None else self.summed(x, y.float() - x.float())

    def summed(self, x: Tensor, added: Tensor) -> Tensor:
        """``x + sum over ranks of added``, float32: this rank's summand."""
        return (x.float() + self.ranks.sum(added)).to(x.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerGroup:
        return LayerGroup(memo.get(id(self._layers())), *self._rest())

    def __reduce__(self) -> tuple:
        return LayerGroup, (self._layers(), *self._rest())

    def _rest(self) -> tuple[int, tuple[Halves, ...], str, int]:
        if self.ranks is not None:
            raise RuntimeError("a model whose layers are spread over ranks cannot be copied: copy it before")
        return self.first, self.halves, self.mode, max(self.bypass, 0)


class GroupMember:
    """The forward of one member, on its instance."""

    def __init__(self, group: LayerGroup, index: int, names: tuple[str, ...]) -> None:
        self.group, self.index = group, index
        self._names = names  # of the arguments of the class's forward, hidden states first

    @property
    def grouped(self) -> bool:
        """Whether the member computes as part of a group, and not less than its layer did."""
        return self.group.mode in ("cqil", "lp")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of the layer's class; all but the last member return their input."""
        x, kwargs = self.named(args, kwargs)
        group = self.group
        if group.mode == "skip":
            return self.wrapped(x)
        if group.mode == "skip_attention":
            return self.wrapped(x + group.halves[self.index].feed(group.members()[self.index], x))
        calls = group.collect(self.index, x, kwargs)
        return self.wrapped(x if calls is None else group.compute(calls))

    def named(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """(hidden states, all other arguments by name)."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs} if len(args) != 1 else dict(kwargs)
        return (args[0] if args else named[self._names[0]]), {k: v for k, v in named.items() if k != self._names[0]}

    def wrapped(self, y: Tensor) -> Any:
        """The layer's result: a tensor, or a tuple that it begins."""
        outputs = self.group.halves[self.index].outputs
        return (y, *[None] * (outputs - 1)) if outputs else y


def member_of(layer: nn.Module) -> GroupMember | None:
    """The membership of a layer, if it is in a group."""
    forward = layer.__dict__.get("forward")
    found = forward if isinstance(forward, GroupMember) else getattr(forward, "member", None)
    return found if isinstance(found, GroupMember) else None


def install_groups(groups: list[LayerGroup]) -> None:
    """Let the layers of these groups compute as their members."""
    for group in groups:
        for index, layer in enumerate(group.members()):
            names = tuple(inspect.signature(type(layer).forward).parameters)[1:]
            layer.__dict__["forward"] = GroupMember(group, index, getattr(layer, "arguments", names))


def remove_groups(layers: nn.ModuleList) -> None:
    """Undo :func:`install_groups`."""
    for layer in layers:
        if isinstance(layer.__dict__.get("forward"), GroupMember):
            del layer.__dict__["forward"]
