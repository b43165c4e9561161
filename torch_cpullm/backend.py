"""The torch.compile backend ``"cpullm"``: packs the weights of linear layers inside a compiled graph.

``model.compile(backend="cpullm")`` or ``torch.compile(model, backend="cpullm")``; torch finds it by entry point, with
no import. In each graph that Dynamo captures, a linear layer becomes the packed operator and linears that share an
input become one; the rest runs eagerly, or through Inductor with ``options={"inductor": True}``. The module keeps its
float weights: for low memory use :func:`torch_cpullm.optimize`. Each graph is reported at INFO (logger torch_cpullm).

Two things that plain use of Dynamo gets wrong, and what is done here:

* Dynamo reuses a graph for every module of the same structure. Weights baked into it are those of one model, so each
  graph is tied by ID_MATCH guards to the parameters it holds. One function may then need many graphs (all HuggingFace
  models share the code of a decorator), more than ``torch._dynamo.config.recompile_limit`` (8) before torch goes back
  to the float model without an error. So each graph of this backend raises the default of that limit by one. A limit
  that you set yourself is kept, and so is ``accumulated_recompile_limit``: 256 graphs of one function, at three or more
  per model, or per layer where layers are compiled one by one.
* ``torch.compile(model, ...).generate()`` runs the uncompiled model, since ``OptimizedModule`` hands out the wrapped
  model's method. Loading this module wraps ``OptimizedModule.__getattr__``, for the whole process: the method
  ``generate`` of a module compiled with this backend runs with the compiled forward. Everything else is passed on.
"""

from __future__ import annotations

import functools
import logging
import operator
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource
from torch._guards import TracingContext

from . import ops
from .config import Recipe, Settings
from .packing import PANEL, PackedWeight, pack
from .plan import check_recipes, sharing_inputs
from .quant import quantize_rtn

log = logging.getLogger("torch_cpullm")

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Accepted for the sake of callers that always name one; they change nothing here."""

HEAD_NAMES = ("lm_head", "embed_out")
"""Module names of an output head that shares no weight with the input embedding."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cpullm(gm: fx.GraphModule, example_inputs: list[Any], **kw: Any) -> Callable[..., Any]:
    """Compile one graph; torch.compile calls this.

    options: ``inductor`` (bool, default False: compile what is not a linear with Inductor, which needs a C++ compiler)
    and the fields of :class:`torch_cpullm.config.Settings`: bits, group_size, sym, compute, head_bits, scale_dtype,
    modules_to_not_convert, overrides. ``head_bits`` holds for the output head; an input embedding stays in float here.
    mode: see :data:`MODES`. Raises ValueError naming the option that is wrong. For inference only: outputs have no
    gradient.
    """
    settings, inductor = parse_options(**kw)
    ops.isa()
    _raise_recompile_limit()
    grad = torch.is_grad_enabled()  # Dynamo compiles again when that changes
    if grad:
        _warn_of_gradients()
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    packed: _Packed = []
    left: dict[str, list[str]] = {}  # reason -> names
    found = _find(gm.graph, values, settings, left)
    with _plain_mode():
        for linears in _share_inputs(gm.graph, found):
            packed += _pack_all(linears, left)
    groups = list({group: None for _, group in packed})
    for linears, group in packed:
        _rewrite(gm, linears, group, f"_cpullm_{groups.index(group)}", settings.compute, inductor)
    _erase_unused(gm.graph, found)
    gm.recompile()
    _log_graph(packed, left)
    forward: Any = gm.forward
    if inductor:
        from torch._inductor.compile_fx import compile_fx

        kept = set(gm.graph.nodes)
        with torch.no_grad():
            forward = compile_fx(gm, [value for node, value in values.items() if node in kept])
    return _runner(forward, groups, grad)


def parse_options(mode: str | None = None, options: dict[str, Any] | None = None) -> tuple[Settings, bool]:
    """(settings, whether to use Inductor) from torch.compile's arguments. Raises ValueError for what is not known."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    values = dict(options or {})
    inductor = values.pop("inductor", False)
    if not isinstance(inductor, bool):
        raise ValueError(f"options['inductor'] must be True or False, got {inductor!r}")
    known = [item.name for item in fields(Settings) if item.name != "kv_cache"]  # the cache is an argument of graphs
    unknown = ", ".join(repr(name) for name in values if name not in known)
    if unknown:
        raise ValueError(f"options of the backend 'cpullm' are inductor, {', '.join(known)}; got {unknown}")
    return Settings(**values), inductor


def _raise_recompile_limit() -> None:
    """One graph more for every thread: see the module's docstring. (What a thread sets itself, others do not see.)"""
    config: Any = torch._dynamo.config
    config._config["recompile_limit"].default += 1


@functools.cache
def _warn_of_gradients() -> None:
    log.warning("backend 'cpullm' is for inference: outputs have no gradient; call the model under torch.no_grad()")


# ---- what a graph holds ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Linear:
    """A node that computes ``x W^T + bias``.

    weight: W [n, k], or W^T [k, n] where ``transposed``. view: a node between weight and product. parameter and
    bias_parameter: what the placeholders stand for.
    """

    node: Any
    x: Any
    weight: Any
    bias: Any = None
    view: Any = None
    transposed: bool = False
    name: str = ""
    recipe: Recipe | None = None
    parameter: Any = None
    bias_parameter: Any = None

    @property
    def n(self) -> int:
        return self.parameter.shape[1 if self.transposed else 0]


def _match(node: fx.Node) -> _Linear | None:
    """The three ways in which transformers' models spell a linear layer."""
    args: Any = node.args
    if node.op != "call_function" or node.kwargs or not all(arg is None or isinstance(arg, fx.Node) for arg in args):
        return None
    if node.target is torch._C._nn.linear:  # nn.Linear
        return _Linear(node, args[0], args[1], args[2] if len(args) > 2 else None)
    if node.target is torch.addmm:  # GPT-2's Conv1D: addmm(bias, x, W^T)
        return _Linear(node, args[1], args[2], args[0], transposed=True)
    if node.target in (operator.matmul, torch.matmul) and args[1].target is getattr and args[1].args[1] == "T":
        return _Linear(node, args[0], args[1].args[0], view=args[1])  # Falcon: x @ W.T
    return None


def _find(graph: fx.Graph, values: dict[Any, Any], settings: Settings, left: dict[str, list[str]]) -> list[_Linear]:
    """Linears to pack. left: takes reason -> names of those that stay as they are."""
    found: list[_Linear] = []
    for node in graph.nodes:
        linear = _match(node)
        if linear is None:
            continue
        weight = values.get(linear.weight)
        if node.target is not torch._C._nn.linear and not isinstance(weight, nn.Parameter):
            continue  # a product of activations
        linear.name, owner = _owner(node)
        tied = any(getattr(user.target, "__name__", "") == "embedding" for user in linear.weight.users)
        head = tied or linear.name.rpartition(".")[2] in HEAD_NAMES
        linear.recipe = settings.recipe(linear.name, head)
        reason = _unsuitable(linear, weight, owner) or ("" if linear.recipe else "excluded by the options")
        if reason:
            left.setdefault(reason, []).append(linear.name)
            continue
        linear.parameter = weight
        bias = values.get(linear.bias)
        linear.bias_parameter = bias if type(bias) is nn.Parameter else None
        found.append(linear)
    recipes: Any = {linear.name: linear.recipe for linear in found}
    check_recipes(recipes, sharing_inputs(recipes), "an input")
    return found


def _owner(node: fx.Node) -> tuple[str, type | None]:
    """Dotted name and class of the module whose forward holds ``node``; (node's name, None) for the compiled module."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name, None
    path, cls = list(stack.values())[-1]
    return re.sub(r"^[A-Z]\['[^']*'\]\.?", "", path) or node.name, cls if isinstance(cls, type) else None


def _unsuitable(linear: _Linear, weight: Any, owner: type | None) -> str:
    """Why this linear must stay as it is, or an empty text."""
    if type(weight) is not nn.Parameter:
        return "its weight is no plain parameter"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}"
    if weight.dim() != 2 or 0 in weight.shape or weight.dtype not in _DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
    x = linear.x.meta.get("example_value")
    if isinstance(x, Tensor) and x.dtype not in _DTYPES:
        return f"its input is {str(x.dtype).removeprefix('torch.')}"
    bias = linear.bias.meta.get("example_value") if linear.bias is not None else None
    if isinstance(bias, Tensor) and bias.dim() != 1:
        return f"its bias is {list(bias.shape)}"
    if owner is not None and not issubclass(owner, nn.Linear) and owner.__name__ != "Conv1D":
        return f"{owner.__name__} is no nn.Linear"  # the router of a mixture, for one: it must stay exact
    return ""


def _share_inputs(graph: fx.Graph, found: list[_Linear]) -> list[list[_Linear]]:
    """Linears that can be one: same input, biases known now, whole panels in all but the last."""
    writes = 0  # operations before a node that may have changed its input in place
    before = {}
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = name.endswith("_") or name in ("setitem", "iadd", "imul", "isub", "itruediv")
        writes += in_place or bool(node.kwargs.get("inplace"))
        before[node] = writes
    together: dict[tuple, list[_Linear]] = {}
    for linear in found:
        dtype = getattr(linear.node.meta.get("example_value"), "dtype", None)
        together.setdefault((linear.x, before[linear.node], linear.recipe, linear.transposed, dtype), []).append(linear)
    result: list[list[_Linear]] = []
    for linears in together.values():
        whole = all(linear.n % PANEL == 0 for linear in linears[:-1])
        known = all(linear.bias is None or linear.bias_parameter is not None for linear in linears)
        distinct = len({id(linear.parameter) for linear in linears}) == len(linears)
        result += [linears] if whole and known and distinct else [[linear] for linear in linears]
    return result


# ---- packed weights -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Group:
    """Parameters packed as one weight, rows one after the other; shared by all graphs that use them.

    parameters: weights, then the biases that ``bias`` [n] holds (several weights, at least one of them with a bias).
    """

    linears: list[tuple[str, int, bool]]  # name, rows, whether bias holds its bias
    parameters: list[weakref.ref]
    transposed: bool
    recipe: Recipe
    stamps: list[tuple[int, int]]
    packed: PackedWeight
    bias: Tensor | None

    def refresh(self) -> None:
        """Pack again, into the same memory, if a parameter was written since. Raises ValueError: NaN, inf."""
        with _lock, _plain_mode():
            parameters: list[Any] = [ref() for ref in self.parameters]
            stamps = [_stamp(parameter) for parameter in parameters]
            if stamps == self.stamps:
                return
            names, count = ", ".join(name for name, _, _ in self.linears), len(self.linears)
            try:
                new = _pack(parameters[:count], self.transposed, self.recipe)
            except ValueError as error:
                raise ValueError(f"{names} was written and cannot be packed again: {error}") from error
            self.packed.codes.copy_(new.codes)
            self.packed.scales.copy_(new.scales)
            if self.packed.zeros is not None and new.zeros is not None:
                self.packed.zeros.copy_(new.zeros)
            if self.bias is not None:
                self.bias.copy_(_join_biases(self.linears, parameters[count:]))
            self.stamps = stamps
        log.info("packed again, since it was written: %s", names)


_Packed = list[tuple[list[_Linear], _Group]]

_groups: weakref.WeakValueDictionary[tuple, _Group] = weakref.WeakValueDictionary()
"""(recipe, ids of the parameters) -> their group, which lives as long as a graph that uses it."""

_lock = threading.RLock()


@contextmanager
def _plain_mode() -> Iterator[None]:
    """For packing: tensors that may be written later, and no casts."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def _stamp(parameter: Tensor) -> tuple[int, int]:
    """Changes when a parameter is written in place or given other memory."""
    return (-1 if parameter.is_inference() else parameter._version, parameter.data_ptr())


def _pack(weights: list[Tensor], transposed: bool, recipe: Recipe) -> PackedWeight:
    """Quantise and pack [n_i, k] matrices (or [k, n_i], transposed) as one. Raises ValueError: NaN, inf."""
    matrices = [weight.detach().T if transposed else weight.detach() for weight in weights]
    parts = [pack(quantize_rtn(matrix, *recipe)) for matrix in matrices]
    if len(parts) == 1:
        return parts[0]
    codes = torch.cat([part.codes for part in parts])
    scales = torch.cat([part.scales for part in parts])
    zeros = [part.zeros for part in parts if part.zeros is not None]
    n = sum(part.n for part in parts)
    return PackedWeight(codes, scales, torch.cat(zeros) if zeros else None, n, parts[0].k, *recipe[:2])


def _join_biases(linears: list[tuple[str, int, bool]], biases: list[Tensor]) -> Tensor:
    """The biases [n_i] one after the other, zeros where there is none."""
    given = iter(biases)
    return torch.cat([next(given).detach() if present else biases[0].new_zeros(n) for _, n, present in linears])


def _group(linears: list[_Linear]) -> _Group:
    """The packed weights of ``linears``: those of an earlier graph, or new ones. Raises ValueError: NaN, inf."""
    recipe, transposed = cast("Recipe", linears[0].recipe), linears[0].transposed
    biases = [linear.bias_parameter if len(linears) > 1 else None for linear in linears]
    given = [bias for bias in biases if bias is not None]
    parameters = [linear.parameter for linear in linears] + given
    rows = [(linear.name, linear.n, bias is not None) for linear, bias in zip(linears, biases, strict=True)]
    key = (recipe, transposed, *(present for _, _, present in rows), *((id(p), p.shape) for p in parameters))
    group = _groups.get(key)
    if group is not None and all(ref() is p for ref, p in zip(group.parameters, parameters, strict=True)):
        group.refresh()
        return group
    refs, stamps = [weakref.ref(p) for p in parameters], [_stamp(p) for p in parameters]
    packed = _pack(parameters[: len(linears)], transposed, recipe)
    bias = _join_biases(rows, given) if given else None
    _groups[key] = group = _Group(rows, refs, transposed, recipe, stamps, packed, bias)
    return group


def _pack_all(linears: list[_Linear], left: dict[str, list[str]]) -> _Packed:
    """Pack linears that share an input as one, or one by one if a weight of theirs cannot be quantised."""
    try:
        return [(linears, _group(linears))]
    except ValueError as error:
        if len(linears) == 1:
            left.setdefault(str(error), []).append(linears[0].name)
            return []
    return [pair for linear in linears for pair in _pack_all([linear], left)]


# ---- the new graph --------------------------------------------------------------------------------------------------


def _rewrite(gm: Any, linears: list[_Linear], group: _Group, name: str, compute: str, inductor: bool) -> None:
    """Put the packed operator, and a split where linears are merged, in the place of ``linears``."""
    graph, first = gm.graph, linears[0]
    packed, example = group.packed, first.x.meta.get("example_value")
    with graph.inserting_before(first.node):
        parts = {"codes": packed.codes, "scales": packed.scales, "zeros": packed.zeros, "bias": group.bias}
        tensors = [_constant(gm, f"{name}_{part}", t, first.weight, inductor) for part, t in parts.items()]
        if len(linears) == 1:
            tensors[3] = first.bias
        args = (first.x, *tensors, None, packed.n, packed.k, packed.group, ops.COMPUTE[compute])
        y = graph.call_function(torch.ops.cpullm.linear.default, args)
        want = first.node.meta.get("example_value")
        if isinstance(want, Tensor) and isinstance(example, Tensor) and want.dtype != example.dtype:
            y = graph.call_method("to", (y, want.dtype))  # autocast
        results = [y]
        if len(linears) > 1:
            split = graph.call_function(torch.split, (y, [linear.n for linear in linears], -1))
            results = [graph.call_function(operator.getitem, (split, i)) for i in range(len(linears))]
            for i, linear in enumerate(linears):
                if any(user.op == "output" or user.target == "view" for user in linear.node.users):
                    results[i] = graph.call_method("contiguous", (results[i],))  # as they expect it
    guards = TracingContext.get().guards_context.dynamo_guards
    for linear, result in zip(linears, results, strict=True):
        for held in (linear.weight, linear.bias if len(linears) > 1 else None):
            if held is not None:  # the graph is right for this very parameter only
                guards.add(held._dynamo_source.make_guard(GuardBuilder.ID_MATCH))
        result.meta = {**linear.node.meta, **result.meta}
        linear.node.replace_all_uses_with(result)
        graph.erase_node(linear.node)


def _constant(gm: Any, name: str, tensor: Tensor | None, weight: Any, inductor: bool) -> fx.Node | None:
    """A node that reads ``tensor`` from the graph module."""
    if tensor is None:
        return None
    if not inductor:
        gm.__dict__[name] = tensor  # found faster than a buffer
    elif name not in gm._buffers:
        gm.register_buffer(name, tensor, persistent=False)
        gm._param_name_to_source[name] = AttrSource(weight._dynamo_source, name)  # AOTAutograd asks for one per tensor
    return gm.graph.create_node("get_attr", name)


def _erase_unused(graph: fx.Graph, found: list[_Linear]) -> None:
    """Drop parameters that only packed linears used (Dynamo passes them no more), and switches of the grad mode."""
    for node in graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        graph.erase_node(node)
    for linear in found:
        for node in (linear.view, linear.weight, linear.bias):
            if node is not None and not node.users and not node._erased:
                graph.erase_node(node)


def _runner(forward: Callable[..., Any], groups: list[_Group], grad: bool) -> Callable[..., Any]:
    """``forward``, preceded by a look at the parameters: what was written is packed again. No gradients."""
    refs: list[Any] = [ref for group in groups for ref in group.parameters]
    versioned = [ref for ref in refs if not ref().is_inference()]  # those have no version

    def stamps() -> list[int]:
        return [ref()._version for ref in versioned] + [ref().data_ptr() for ref in refs]

    seen = stamps()

    def run(*args: Any) -> Any:
        nonlocal seen
        now = stamps()
        if now != seen:
            for group in groups:
                group.refresh()
            seen = now
        if grad:
            with torch.no_grad():
                return forward(*args)
        return forward(*args)

    return run


def _log_graph(packed: _Packed, left: dict[str, list[str]]) -> None:
    """One line per graph, and one for what stays."""
    count = sum(len(linears) for linears, _ in packed)
    size = sum(group.packed.nbytes for group in {group for _, group in packed})
    head = sum(len(linears) for linears, group in packed if group.recipe.bits == 8)
    log.info("graph: %d linears in %d packed operators (%d in 8 bits), %.1f MB", count, len(packed), head, size / 1e6)
    for reason, names in left.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        log.info("left in float: %s%s: %s", ", ".join(names[:4]), more, reason)


# ---- torch.compile(model).generate() --------------------------------------------------------------------------------

_generating: weakref.WeakKeyDictionary[nn.Module, tuple[int, Any]] = weakref.WeakKeyDictionary()
"""Model -> (calls under way, what its _compiled_call_impl was before)."""


@contextmanager
def _compiled_forward(model: Any, context: Any) -> Iterator[None]:
    """Inside, calling ``model`` runs its compiled forward. One that was compiled in place stays as it is."""
    with _lock:
        calls, before = _generating.get(model, (0, model._compiled_call_impl))
        _generating[model] = (calls + 1, before)
        if not calls and before is None:
            model._compiled_call_impl = context(model._call_impl)
    try:
        yield
    finally:
        with _lock:
            calls, before = _generating.pop(model)
            if calls > 1:
                _generating[model] = (calls - 1, before)
            else:
                model._compiled_call_impl = before


def _compiled_here(module: OptimizedModule) -> bool:
    """Whether torch.compile made ``module`` with this backend."""
    backend: Any = getattr(module.dynamo_ctx, "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return getattr(backend, "compiler_fn", backend) is cpullm


def _wrap_attribute_lookup() -> None:
    """Let ``generate`` of modules compiled with this backend run compiled; see the module's docstring."""
    lookup = OptimizedModule.__getattr__
    if hasattr(lookup, "_cpullm_wraps"):
        return

    @functools.wraps(lookup)
    def __getattr__(self: OptimizedModule, name: str) -> Any:
        value = lookup(self, name)
        if name != "generate" or not callable(value) or not _compiled_here(self):
            return value

        @functools.wraps(value)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with _compiled_forward(self._orig_mod, self.dynamo_ctx):
                return value(*args, **kwargs)

        return generate

    __getattr__._cpullm_wraps = lookup  # type: ignore[attr-defined]
    OptimizedModule.__getattr__ = __getattr__  # type: ignore[method-assign]


_wrap_attribute_lookup()
