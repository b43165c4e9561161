"""optimize(model): every linear layer and all experts of a model to packed INT4, in place, and back."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import ops
from .attention import restore_attention, use_attention
from .config import Settings
from .coverage import optimised, report
from .experts import PackedExperts
from .launch import apply_default_threads
from .layer import install_programs, remove_programs
from .linear import Packed, PackedEmbedding, PackedLinear, PackedModule, gather
from .packing import PackedStack
from .plan import Target, check_overrides, check_strict, check_weight, find_targets
from .saving import teach_to_save

log = logging.getLogger("torch_cpullm")


def optimize(model: nn.Module, config: Settings | None = None, *, strict: bool = False) -> nn.Module:
    """Replace every linear layer of ``model`` by packed INT4 weights, and its head and input embedding by INT8.

    Works in place and returns ``model``; ``generate()`` and pipelines work as before. nn.Linear, transformers' Conv1D,
    subclasses of nn.Linear that behave like it, and the experts of a mixture in transformers' usual layout are
    replaced; everything else, the routers among it, stays and :func:`report` says why. The float weights are freed as
    it goes, and what stays is frozen; :func:`restore` gives a trainable float model back (of the quantised values). A
    second call with the same settings does nothing. Sets torch's thread count once per process unless the user has
    (:func:`torch_cpullm.launch.apply_default_threads`).

    config: :class:`torch_cpullm.CpuLlmConfig` or :class:`torch_cpullm.config.Settings`; default INT4, group 32, zero
    points, int8 compute. strict: raise instead of leaving a weight matrix in float, routers of packed experts aside.

    Raises TypeError or ValueError, before anything is changed: ``model`` is no module, is on another device or on meta,
    is quantised by another method or with other settings, holds NaN or inf (named), or ``strict`` cannot be met. Raises
    RuntimeError when CPULLM_ISA names a level this machine cannot run.
    """
    settings = config if config is not None else Settings()
    if not isinstance(settings, Settings):
        raise TypeError(f"config must be a CpuLlmConfig, got {type(config).__name__}")
    settings.validate()
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        optimize(cast("Any", model).get_base_model(), settings, strict=strict)  # adapters save themselves
        return model
    check_model(model, settings)
    ops.isa()
    targets, skipped = find_targets(model, settings)
    check_overrides(settings, targets, [*skipped, *(name for name, _ in packed_modules(model))], {})
    for target in targets:
        for stored in target.parameters.values():
            check_weight(target.name, stored)
    if strict or getattr(settings, "strict", False):
        check_strict(model, targets, skipped)
    apply_default_threads()
    model.eval()
    frozen = freeze(model)
    packed: dict[int, Packed] = {}
    for target in progress(targets):
        swap_module(model, target, settings, packed)
    del packed  # the memory of what finish() moves is free then
    finish(model, settings, skipped, frozen, swapped=bool(targets))
    return model


def progress(targets: list[Target]) -> Iterable[Target]:
    """The targets, with a bar on a terminal."""
    return tqdm(targets, desc="torch_cpullm", unit="module", disable=not targets or _progress_disabled())


def swap_module(model: nn.Module, target: Target, settings: Settings, packed: dict[int, Packed]) -> None:
    """Replace one module. packed: id of a float weight -> its packed form, so that tied weights stay one copy."""
    weights = list(target.parameters.values())
    for stored in weights:
        if id(stored) not in packed:
            packed[id(stored)] = target.packed(stored)
    new = target.replacement([packed[id(stored)] for stored in weights], weights[0].dtype, settings.compute)
    put_in_place(model, target, new)


def put_in_place(model: nn.Module, target: Target, new: nn.Module) -> None:
    """Register ``new`` wherever the target's module was."""
    for name in target.names:
        _set_module(model, name, new)


def finish(
    model: nn.Module, settings: Settings, skipped: dict[str, str], frozen: set[str], *, swapped: bool = True
) -> None:
    """All that follows the swap: small weights into huge pages, attention, cache, layer programs, the guard, and a
    warning about what stays in float.

    skipped: name -> reason for modules that stay. frozen: parameters that restore() makes trainable again. swapped:
    whether there are new weights.
    """
    _set_attributes(model, _cpullm_settings=settings, _cpullm_skipped=skipped, _cpullm_frozen=frozen)
    _leave_files(model)
    use_attention(model)
    if "transformers" in sys.modules:  # else the model cannot be one of its models
        _kv_cache().use_cache_class(model, settings.kv_cache)
    if swapped:
        gather(model)
    install_programs(model)
    _guard(model)
    _return_free_memory()
    left = report(model).left_in_float
    if left:
        log.warning(
            "%d weights stay in float, for example %s (%s); torch_cpullm.report(model) lists them",
            len(left),
            left[0].name,
            left[0].reason,
        )


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`optimize` in place: the original modules with the dequantised weights, in each module's dtype.

    The original float values are gone; the model computes with what INT4 made of them. Returns ``model``; a model that
    was never optimised is returned as it is. Raises RuntimeError for a rank's share: it is no model of its own.
    """
    whole, model = model, optimised(model)
    if "_cpullm_ranks" in model.__dict__:
        raise RuntimeError("this rank holds a share of the model: load it whole to have its float weights back")
    remove_programs(model)
    weights: dict[tuple[int, int, torch.dtype], nn.Parameter] = {}
    originals: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, PackedModule):
            continue
        if module not in originals:
            own = {}
            order = module.order if isinstance(module, PackedLinear) else None
            for key, packed in module.weights().items():
                known = (id(packed), id(order), module.dtype)
                if known not in weights:
                    value = _dequantized(packed, module.dtype)
                    value = module.in_order(value) if isinstance(module, PackedLinear) else value
                    weights[known] = nn.Parameter(value, requires_grad=False)
                own[key] = weights[known]
            originals[module] = _original(module, own)
        _set_module(model, name, originals[module])
    trained = model.__dict__.get("_cpullm_frozen")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is None or name in trained)
    for name in ("_cpullm_settings", "_cpullm_skipped", "_cpullm_frozen", "_apply", "parameters"):
        model.__dict__.pop(name, None)
    restore_attention(model)
    if "transformers" in sys.modules:
        _kv_cache().restore_cache_class(model)
    if getattr(model, "hf_device_map", None) == _CPU_MAP:
        del model.hf_device_map
    quantizer: Any = model.__dict__.get("hf_quantizer")
    if getattr(getattr(quantizer, "quantization_config", None), "quant_method", None) == "cpullm":
        quantizer.remove_quantization_config(model)  # from_pretrained put it there
    return whole


def _kv_cache() -> Any:
    """The module, which imports transformers."""
    from . import kv_cache

    return kv_cache


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_model(model: nn.Module, settings: Settings) -> None:
    """TypeError or ValueError for a model that :func:`optimize` cannot change as ``settings`` say."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.Linear, nn.Embedding)):
        raise ValueError(
            f"model is a single {type(model).__name__}, which cannot be replaced in place; pass its parent"
        )
    before = getattr(model, "_cpullm_settings", None)
    if before is not None and not before.same_as(settings):
        raise ValueError("model is already optimised with other settings; call torch_cpullm.restore(model) first")
    method = getattr(getattr(model, "config", None), "quantization_config", None)
    method = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
    if method is not None and str(getattr(method, "value", method)) != "cpullm":
        raise ValueError(
            f"model is already quantised by {getattr(method, 'value', method)!r}; load the float model "
            "(a GGUF file: pass GgufConfig(dequantize=True), or use `cpullm generate --model FILE`)"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise ValueError(f"model must hold its weights, but {name} is on the meta device")
        if tensor.device.type != "cpu":
            raise ValueError(f"model must be on the CPU, but {name} is on {tensor.device}; call model.cpu() first")


# ---- swap ----------------------------------------------------------------------------------------------------------


def _dequantized(packed: Packed, dtype: torch.dtype) -> Tensor:
    """[n, k] or [experts, n, k] of ``dtype``."""
    if isinstance(packed, PackedStack):
        return torch.stack([ops.dequantize(packed[i]).to(dtype) for i in range(packed.count)])
    return ops.dequantize(packed).to(dtype)


def _original(module: PackedModule, weights: dict[str, nn.Parameter]) -> nn.Module:
    """The float module that ``module`` replaced, with these weights [n, k] or [experts, n, k]."""
    original = module.__dict__.get("_original")
    if isinstance(module, PackedExperts):
        if original is None:
            raise RuntimeError("these PackedExperts were not made by optimize(): the float module is not known")
        original._parameters.update(weights)
        return original.train(module.training)
    weight = weights["weight"]
    if original is None:
        if isinstance(module, PackedLinear):
            original = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        else:
            assert isinstance(module, PackedEmbedding)
            original = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
    transposed = not isinstance(original, (nn.Linear, nn.Embedding))
    original.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False) if transposed else weight
    if isinstance(module, PackedLinear) and module.bias is not None:
        original.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return original.train(module.training)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _set_attributes(module: nn.Module, **attributes: object) -> None:
    """Plain assignments; torch's annotations allow tensors and modules only."""
    for name, value in attributes.items():
        setattr(module, name, value)


def freeze(model: nn.Module) -> set[str]:
    """Turn gradients off where they are on, and say where: nothing of an optimised model can be trained."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    return names | getattr(model, "_cpullm_frozen", set())


def _leave_files(model: nn.Module) -> None:
    """Copy the parameters that stay out of mapped files that are mostly something else.

    transformers gives each a part of the mapped checkpoint, all of which would stay mapped, and count as resident, for
    the sake of a few norms. A mapping that is shared (``share_memory_()``) is left alone.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    lines = (line.split(maxsplit=5) for line in maps.read_text(errors="replace").splitlines())
    files = [
        tuple(int(end, 16) for end in line[0].split("-")) for line in lines if line[4] != "0" and line[1][3] == "p"
    ]
    originals = [m.__dict__["_original"] for _, m in packed_modules(model) if m.__dict__.get("_original") is not None]
    parameters = [
        each
        for module in (model, *originals)
        for each in module.parameters()
        if not each.is_meta and each.layout == torch.strided
    ]
    for begin, end in files:
        inside = [each for each in parameters if begin <= each.data_ptr() < end]
        if inside and 2 * sum(each.nbytes for each in inside) < end - begin:
            for parameter in inside:
                with torch.inference_mode(parameter.is_inference()):
                    parameter.data = parameter.data.clone()


def _return_free_memory() -> None:
    """Give the freed float weights back to the system: blocks of up to 32 MB glibc would keep for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


_CPU_MAP = {"": torch.device("cpu")}


def _guard(model: nn.Module) -> None:
    """Keep the model on the CPU, whole, and let transformers' methods save and dequantise packed weights."""
    _set_attributes(model, _apply=_GuardedApply(model), parameters=_Parameters(model))
    if not hasattr(model, "save_pretrained"):
        return
    if torch.accelerator.is_available() and not hasattr(model, "hf_device_map"):
        _set_attributes(model, hf_device_map=dict(_CPU_MAP))  # pipelines look here before they move a model to a GPU
    teach_to_save(type(model))
    _teach_to_dequantize(type(model))


class _GuardedApply:
    """``Module._apply`` that finds out first whether the packed modules would refuse, so that none is left half moved.

    It holds no reference to its model, so that a deleted one is gone at once, and is copied and pickled with it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        model = self._model()
        assert model is not None
        for _, module in packed_modules(model):
            module.check_movable(fn)
            break
        return type(model)._apply(model, fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> _GuardedApply:
        return _GuardedApply(memo[id(self._model())])

    def __reduce__(self) -> tuple:
        return _GuardedApply, (self._model(),)


class _Parameters:
    """``Module.parameters`` that does not walk through packed modules to the first one.

    transformers asks for that twice per token, as the model's device: 14 us each. Holds no reference to its model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        first = next((name for name, _ in model.named_parameters()), "")
        self._path, _, self._name = first.rpartition(".")

    def __call__(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of the class's method, each once, the first of them found by its name."""
        model: Any = self._model()
        module = model
        for name in self._path.split(".") if self._path else ():
            module = None if module is None else module._modules.get(name)
        first = module._parameters.get(self._name) if module is not None and recurse else None
        if first is not None:
            yield first
        yield from (each for each in type(model).parameters(model, recurse) if each is not first)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Parameters:
        revive, arguments = self.__reduce__()
        return revive(memo[id(self._model())], *arguments[1:])

    def __reduce__(self) -> tuple:
        return _parameters_of, (self._model(), self._path, self._name)


def _parameters_of(model: nn.Module, path: str, name: str) -> _Parameters:
    """A copied model's, whose modules may not be there yet."""
    made = _Parameters.__new__(_Parameters)
    made._model, made._path, made._name = weakref.ref(model), path, name
    return made


def _teach_to_dequantize(kind: Any) -> None:
    """Let ``dequantize`` of this class know models of optimize(); on the class, as :func:`teach_to_save` says."""
    original = kind.dequantize
    if getattr(original, "_cpullm", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = "_cpullm_settings" in self.__dict__ and "hf_quantizer" not in self.__dict__
        return (dequantize if ours else original)(self, *args, **kwargs)

    cast("Any", method)._cpullm = True
    kind.dequantize = method


def dequantize(model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
    """:func:`restore`, and then the parameters in ``dtype``: what transformers' ``model.dequantize`` promises."""
    restore(model)
    if dtype is not None:  # a text in a config that was saved; buffers stay: rotary frequencies are always float32
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for parameter in model.parameters():
            parameter.data = parameter.data.to(kind)
    return model


def _progress_disabled() -> bool | None:
    """True where HuggingFace's switches turn progress bars off; None lets tqdm look for a terminal."""
    hub = sys.modules.get("huggingface_hub.utils")
    if hub is not None and hub.are_progress_bars_disabled():
        return True
    logging_module = sys.modules.get("transformers.utils.logging")
    if logging_module is not None and not logging_module.is_progress_bar_enabled():
        return True
    return None


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """(name, module) of every packed module of ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield name, module
