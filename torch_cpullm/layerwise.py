"""Calibration layer by layer: one decoder layer in float32, its inputs and its outputs are all that is held.

    inputs of the first layer     captured once from the model, on the calibration tokens
    each layer                    a copy runs on what the quantised layers before give; its linears' inputs are summed
                                  up, channels rescaled, weights rounded; the copy with these weights gives the inputs
                                  of the next
    the model                     is never changed; :func:`torch_cpullm.calibrated.apply` does that, when all is done

With a folder each finished layer is kept there, and a run that was stopped goes on behind the last of them.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .calibrated import Calibrated, read_layer, write_layer
from .checkpoint import Form
from .config import SCALE_DTYPES
from .devices import device_of, usable
from .folding import apply_fold, find_folds, matrix
from .packing import PackedWeight, QuantizedWeight, dequantize, pack
from .quality import check_ids
from .quant import (
    Statistics,
    awq_scales,
    quantize_clip,
    quantize_gptq,
    quantize_hqq,
    quantize_rtn,
    quantize_signround,
    refine,
    teq_scales,
)

SCALES: dict[str, Callable[..., Tensor]] = {"awq": awq_scales, "teq": teq_scales}
_ROWS = 4096  # of inputs that are summed up at once
ROUNDING = ("rtn", "hqq", "clip", "gptq", "signround")


@dataclass(frozen=True)
class Method:
    """How weights become codes. rounding: one of ROUNDING; scales: "", "awq" or "teq"; sweeps: how often
    scales and codes are refined afterwards; epochs: how often the scales, and with ``codes`` the codes too, then learn
    from the float model (:mod:`torch_cpullm.distil`). See torch_cpullm.quant. Raises ValueError naming the field that
    is wrong.
    """

    rounding: str = "gptq"
    scales: str = ""
    sweeps: int = 0
    damping: float = 0.01
    epochs: int = 0
    codes: bool = False

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDING:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDING)}, got {self.rounding!r}")
        if self.scales not in ("", *SCALES):
            raise ValueError(f"scales must be empty or one of {', '.join(SCALES)}, got {self.scales!r}")
        for name, value in (("sweeps", self.sweeps), ("epochs", self.epochs)):
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        if not 0 < self.damping < 1:
            raise ValueError(f"damping must lie between 0 and 1, got {self.damping!r}")

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration tokens at all."""
        uses = self.scales, self.sweeps, self.epochs, self.rounding not in ("rtn", "hqq")
        return any(uses)

    def __str__(self) -> str:
        parts = [self.scales.upper(), self.rounding.upper(), f"refined x{self.sweeps}" if self.sweeps else ""]
        parts.append(f"distilled x{self.epochs}{', codes too' if self.codes else ''}" if self.epochs else "")
        return " + ".join(part for part in parts if part)


def quantize(weight: Tensor, statistics: Statistics | None, form: Form, method: Method) -> QuantizedWeight:
    """``weight`` [n, k] in ``form`` by ``method``; 8 bits, and weights without statistics, are rounded to nearest."""
    dtype = SCALE_DTYPES[form.scales]
    shape = (form.bits, form.group_size, form.zeros, dtype)
    if method.rounding == "hqq" or (form.zeros == "minimum" and (statistics is None or method.rounding == "rtn")):
        found = quantize_hqq(weight, *shape)
    elif statistics is None or form.bits == 8 or method.rounding == "rtn":
        found = quantize_rtn(weight, form.bits, form.group_size, form.zeros == "none", dtype)
    elif method.rounding == "clip":
        found = quantize_clip(weight, statistics, *shape)
    elif method.rounding == "signround":
        found = quantize_signround(weight, statistics, *shape)
    else:
        found = quantize_gptq(weight, statistics, *shape, damping=method.damping)
    if method.sweeps and statistics is not None and form.bits == 4:
        found = refine(weight, found.to(weight.device), statistics, method.sweeps, method.damping)
    return found


# ---- the layers of a model ------------------------------------------------------------------------------------------


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the longest list of modules of one class; ValueError where there is none."""
    found: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        alike = isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
        if alike and (found is None or len(module) > len(found[1])):
            found = name, module
    if found is None:
        raise ValueError("the model has no list of decoder layers to calibrate one by one")
    return found


@dataclass
class _Call:
    """What a layer is called with beside its input; float tensors in float32."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class _EnoughError(Exception):
    """What was to be seen is seen: the rest of the model, or of the layer, need not run."""


def capture(model: nn.Module, layers: nn.ModuleList, ids: Tensor) -> tuple[Tensor, list[_Call]]:
    """(inputs of the first layer [sequences, s, hidden] float32, each layer's other arguments), where the model is."""
    calls: dict[int, _Call] = {}
    inputs: list[Tensor] = []

    def before(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            rest, x = (arguments[1:], arguments[0]) if arguments else ((), keywords["hidden_states"])
            keywords = {name: value for name, value in keywords.items() if name != "hidden_states"}
            calls.setdefault(index, _Call(*_tensors((rest, keywords), _as_float)))
            if index == 0:
                inputs.append(x.detach().float())
                if len(inputs) > 1:
                    raise _EnoughError

        return hook

    handles = [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(layers)]
    options = {"use_cache": False} if hasattr(model, "config") else {}
    try:
        with torch.no_grad():
            for row in ids.to(device_of(model)):
                try:
                    model(row[None], **options)
                except _EnoughError:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    if len(inputs) != len(ids) or len(calls) != len(layers):
        raise ValueError("the model does not call each of its decoder layers once per forward")
    return torch.cat(inputs), [calls[index] for index in range(len(layers))]


def _as_float(x: Tensor) -> Tensor:
    return x.detach().float() if x.is_floating_point() else x.detach()


def _moved(call: _Call, device: torch.device) -> _Call:
    return _Call(*_tensors((call.arguments, call.keywords), lambda x: x.to(device)))


def _tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {name: _tensors(item, change) for name, item in value.items()}
    return value


def run_layer(layer: nn.Module, x: Tensor, call: _Call) -> Tensor:
    """The layer's output for x [s, hidden]."""
    with torch.no_grad():
        out = layer(x[None], *call.arguments, **call.keywords)
    return (out[0] if isinstance(out, (tuple, list)) else out)[0]


# ---- one layer ------------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What the linears of a layer read. sources: linear -> the module whose output it was; shared: linear -> the first
    linear that read the same tensor, under whose name the statistics are.
    """

    statistics: dict[str, Statistics] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)


def look(layer: nn.Module, linears: list[str], inputs: Tensor, call: _Call, where: str) -> _Seen:
    """Statistics of what ``linears`` read while the layer runs on inputs; ValueError, naming the linear, for NaN."""
    seen = _Seen()
    waiting: dict[str, list[Tensor]] = {}  # rows to come into the statistics together: one large product is faster
    made: dict[int, tuple[str, Tensor]] = {}  # id of a tensor -> who made it; holds it, so that the id stays its own
    read: dict[int, tuple[str, Tensor]] = {}
    done: set[str] = set()  # linears that have read in this forward

    def produced(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                made[id(out)] = name, out

        return hook

    def reads(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]
            if id(x) in made:
                seen.sources[name] = made[id(x)][0]
            first = read.setdefault(id(x), (name, x))[0]
            seen.shared[name] = first
            if first == name:
                waiting.setdefault(name, []).append(x.detach().flatten(0, -2).clone())
                if sum(map(len, waiting[name])) >= _ROWS:
                    gather(name)
            done.add(name)
            if len(done) == len(linears):
                raise _EnoughError

        return hook

    def gather(name: str) -> None:
        x = torch.cat(waiting.pop(name))
        before = seen.statistics.get(name) or Statistics.empty(x.shape[-1], x.device)
        try:
            seen.statistics[name] = before.with_rows(x)
        except ValueError as error:
            raise ValueError(f"calibration: {where}{name}: {error}") from error

    handles = [layer.get_submodule(name).register_forward_pre_hook(reads(name)) for name in linears]
    handles += [m.register_forward_hook(produced(name)) for name, m in layer.named_modules() if name]
    try:
        for x in inputs:
            with contextlib.suppress(_EnoughError):
                run_layer(layer, x, call)
            made.clear()
            read.clear()
            done.clear()
        for name in list(waiting):
            gather(name)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def calibrate_layer(
    layer: nn.Module,
    linears: dict[str, Form],
    inputs: Tensor,
    call: _Call,
    method: Method,
    where: str,
) -> Calibrated:
    """Quantise the linears of ``layer``, a float32 copy, which gets the quantised values. Names are the layer's own."""
    found = Calibrated()
    seen = look(layer, list(linears), inputs, call, where) if method.needs_data else _Seen()
    divided: dict[str, Tensor] = {}
    if method.scales:
        divided = _fold(layer, linears, seen, inputs[0], call, method, found)
    for names in _alike(linears, seen, divided):
        statistics = seen.statistics.get(seen.shared.get(names[0], names[0]))
        if statistics is not None and names[0] in divided:
            statistics = statistics.divided(divided[names[0]])
        weights = [matrix(layer.get_submodule(name)) for name in names]
        try:
            quantized = quantize(torch.cat(weights), statistics, linears[names[0]], method)
        except ValueError as error:
            raise ValueError(f"calibration: {where}{', '.join(names)}: {error}") from error
        for name, weight, part in zip(names, weights, _rows(quantized, [len(w) for w in weights]), strict=True):
            weight.copy_(dequantize(part))
            found.packed[name] = pack(part.to("cpu"))
    return found


def _alike(linears: Mapping[str, Form], seen: _Seen, divided: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in lists of one input and one form: rows are rounded apart, and what the input costs is paid once."""
    found: dict[Any, list[str]] = {}
    for name, form in linears.items():
        found.setdefault((seen.shared.get(name, name), form, id(divided.get(name))), []).append(name)
    return list(found.values())


def _rows(whole: QuantizedWeight, counts: list[int]) -> list[QuantizedWeight]:
    """``whole`` cut into weights of so many rows."""
    codes, scales = whole.codes.split(counts), whole.scales.split(counts)
    zeros = [None] * len(counts) if whole.zeros is None else whole.zeros.split(counts)
    return [replace(whole, codes=c, scales=s, zeros=z) for c, s, z in zip(codes, scales, zeros, strict=True)]


def _fold(
    layer: nn.Module, linears: dict[str, Form], seen: _Seen, x: Tensor, call: _Call, method: Method, found: Calibrated
) -> dict[str, Tensor]:
    """Fold scales where that is possible; linear -> by what its inputs were divided. ``found`` gets what changed."""
    divided: dict[str, Tensor] = {}
    changes = run_layer(layer, x, call) - x
    for fold in find_folds(layer, [name for name in linears if name in seen.shared], seen.sources):
        form = linears[fold.readers[0]]
        if form.bits != 4:
            continue
        weights = [matrix(layer.get_submodule(name)) for name in fold.readers]
        statistics = seen.statistics[seen.shared[fold.readers[0]]]
        scales = SCALES[method.scales](
            weights, statistics, form.bits, form.group_size, form.zeros, SCALE_DTYPES[form.scales], fold.spread
        )
        if not apply_fold(layer, fold, scales, lambda: run_layer(layer, x, call), changes):
            continue
        divided |= dict.fromkeys(fold.readers, scales if fold.spread is None else scales[fold.spread])
        source = layer.get_submodule(fold.source)
        for name, parameter in source.named_parameters(recurse=False):
            if fold.source not in linears or name != "weight":
                found.parameters[f"{fold.source}.{name}"] = parameter.detach().cpu().clone()
    return divided


# ---- all layers -----------------------------------------------------------------------------------------------------


def calibrate(
    model: nn.Module,
    ids: Tensor,
    forms: Mapping[str, Form],
    method: Method,
    *,
    folder: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Calibrated:
    """Quantise the modules named in ``forms`` layer by layer on tokens ids [sequences, s]; ``model`` stays as it is.

    forms: full module name -> the form that its weight gets. Modules outside the decoder layers are rounded to nearest.
    folder: where finished layers are kept and looked for. It belongs to one model, method and set of tokens: files of
    another one are an error. device: where layers are computed, one at a time; None: where the model is.

    Raises ValueError: ids no tokens of the model or not [sequences, s], a layer whose activations hold NaN (named), a
    folder of another run, a device that is not there. On the CPU the same arguments give the same bytes, also if
    stopped and resumed; another device adds in another order, a GPU not always in the same, so a few codes differ.
    """
    ids = check_ids(ids, model)
    if ids.dim() != 2:
        raise ValueError(f"calibration ids must be [sequences, tokens], got {list(ids.shape)}")
    where_to = device_of(model) if device is None else usable(device)
    prefix, layers = decoder_layers(model)
    key = run_key(model, ids, forms, method)
    found = Calibrated()
    inside = {name for name in forms if name.startswith(prefix + ".")}
    tied: dict[tuple[int, Form], PackedWeight] = {}
    for name in sorted(forms.keys() - inside):
        weight = matrix(model.get_submodule(name))
        which = weight.data_ptr(), forms[name]
        if which not in tied:
            tied[which] = pack(quantize(weight, None, forms[name], Method("rtn")).to("cpu"))
        found.packed[name] = tied[which]
    needs = method.needs_data
    inputs, calls = capture(model, layers, ids) if needs else (torch.empty(0), [_Call((), {})] * len(layers))
    inputs = inputs.to(where_to)
    with torch.no_grad():
        bar = tqdm(enumerate(layers), total=len(layers), desc=str(method), unit="layer", disable=not progress)
        for index, original in bar:
            where = f"{prefix}.{index}."
            linears = {name.removeprefix(where): form for name, form in forms.items() if name.startswith(where)}
            path = None if folder is None else Path(folder) / f"layer-{index:04d}.safetensors"
            layer = copy.deepcopy(original).to(where_to, torch.float32).requires_grad_(False)
            call = _moved(calls[index], where_to)
            done = read_layer(path, key, layer, linears) if path is not None and path.exists() else None
            if done is None:
                done = calibrate_layer(layer, linears, inputs, call, method, where)
                if path is not None:
                    write_layer(path, key, done)
            else:
                put_values(layer, done)
            for k, x in enumerate(inputs if index + 1 < len(layers) else ()):
                inputs[k] = run_layer(layer, x, call)
            found.merge(where, done)
    return found


def put_values(layer: nn.Module, done: Calibrated) -> None:
    """Give a float layer the values of its calibrated weights."""
    for name, packed in done.packed.items():
        matrix(layer.get_submodule(name)).copy_(dequantize(packed))
    for name, value in done.parameters.items():
        layer.get_parameter(name).data.copy_(value)


def run_key(model: nn.Module, ids: Tensor, forms: Mapping[str, Form], method: Method) -> str:
    """What a run depends on, in a hash: method but for its epochs, forms, tokens and a sample of every weight."""
    plain = replace(method, epochs=0, codes=False)
    digest = hashlib.sha256(repr((plain, sorted(forms.items(), key=lambda item: item[0]))).encode())
    digest.update(ids.cpu().contiguous().numpy().tobytes())
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 256)].double().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()
