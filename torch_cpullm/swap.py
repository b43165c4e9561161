"""optimize(model): every linear layer of a model to packed INT4, in place, and back."""

from __future__ import annotations

import copy
import ctypes
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import ops
from .attention import restore_attention, use_attention
from .config import SCALE_DTYPES, Settings
from .coverage import EXCLUDED, report, report_with
from .launch import apply_default_threads
from .layer import install_programs, remove_programs
from .linear import PackedEmbedding, PackedLinear
from .packing import PackedWeight, pack
from .quant import quantize_rtn

log = logging.getLogger("torch_cpullm")


@dataclass
class _Target:
    """A module to replace. weight is [n, k] whatever the module stores."""

    names: list[str]  # every place the module is registered at
    module: nn.Module
    kind: str  # linear, conv1d or embedding
    bits: int
    multiplier: float | None = None  # of an embedding that scales its rows

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def stored(self) -> nn.Parameter:
        """The weight as the module has it."""
        return cast("nn.Parameter", self.module.weight)

    @property
    def weight(self) -> Tensor:
        weight = self.stored.detach()
        return weight.T if self.kind == "conv1d" else weight


def optimize(model: nn.Module, config: Settings | None = None, *, strict: bool = False) -> nn.Module:
    """Replace every linear layer of ``model`` by packed INT4 weights, and its head and input embedding by INT8.

    Works in place and returns ``model``; ``generate()`` and pipelines work as before. nn.Linear, transformers' Conv1D
    and subclasses of nn.Linear that behave like it are replaced; everything else stays and :func:`report` says why. The
    float weights are freed as it goes, and what stays is frozen; :func:`restore` gives a trainable float model back (of
    the quantised values). A second call with the same settings does nothing. Sets torch's thread count once per process
    unless the user has (:func:`torch_cpullm.launch.apply_default_threads`).

    config: :class:`torch_cpullm.CpuLlmConfig` or :class:`torch_cpullm.config.Settings`; default INT4, group 32, zero
    points, int8 compute. strict: raise instead of leaving a weight matrix in float.

    Raises TypeError or ValueError, before anything is changed: ``model`` is no module, is on another device or on meta,
    is quantised by another method or with other settings, holds NaN or inf (named), or ``strict`` cannot be met. Raises
    RuntimeError when CPULLM_ISA names a level this machine cannot run.
    """
    settings = config if config is not None else Settings()
    if not isinstance(settings, Settings):
        raise TypeError(f"config must be a CpuLlmConfig, got {type(config).__name__}")
    settings.validate()
    _check_model(model, settings)
    ops.isa()
    targets, skipped = _plan(model, settings)
    _check_weights(targets)
    if strict:
        planned = {name for target in targets for name in target.names}
        left = [row for row in report_with(model, skipped).left_in_float if row.name not in planned]
        if left:
            lines = "\n".join(f"  {row.name}: {row.reason}" for row in left[:8])
            more = f"\n  and {len(left) - 8} more" if len(left) > 8 else ""
            raise ValueError(f"strict=True, but these weights would stay in float:\n{lines}{more}")
    apply_default_threads()
    model.eval()
    _set_attributes(model, _cpullm_settings=settings, _cpullm_skipped=skipped, _cpullm_frozen=_freeze(model))
    packed: dict[int, PackedWeight] = {}
    for target in tqdm(targets, desc="torch_cpullm", unit="module", disable=not targets or _progress_disabled()):
        _swap(model, target, settings, packed)
    use_attention(model)
    if "transformers" in sys.modules:  # else the model cannot be one of its models
        _kv_cache().use_cache_class(model, settings.kv_cache)
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
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`optimize` in place: the original modules with the dequantised weights, in each module's dtype.

    The original float values are gone; the model computes with what INT4 made of them. Returns ``model``; a model that
    was never optimised is returned as it is.
    """
    remove_programs(model)
    weights: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    originals: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, (PackedLinear, PackedEmbedding)):
            continue
        key = (id(module.packed), module.dtype)
        if key not in weights:
            weights[key] = nn.Parameter(ops.dequantize(module.packed).to(module.dtype), requires_grad=False)
        if module not in originals:
            originals[module] = _original(module, weights[key])
        _set_module(model, name, originals[module])
    trained = model.__dict__.get("_cpullm_frozen")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is None or name in trained)
    for name in ("_cpullm_settings", "_cpullm_skipped", "_cpullm_frozen", "_apply", "save_pretrained"):
        model.__dict__.pop(name, None)
    restore_attention(model)
    if "transformers" in sys.modules:
        _kv_cache().restore_cache_class(model)
    if getattr(model, "hf_device_map", None) == _CPU_MAP:
        del model.hf_device_map
    return model


def _kv_cache() -> Any:
    """The module, which imports transformers."""
    from . import kv_cache

    return kv_cache


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_model(model: nn.Module, settings: Settings) -> None:
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


def _check_weights(targets: list[_Target]) -> None:
    for target in targets:
        low, high = torch.aminmax(target.stored.detach())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError(f"the weight of {target.name} holds NaN or inf")
        if float(torch.maximum(-low, high)) > 65504:
            raise ValueError(f"the weight of {target.name} holds values beyond 65504, too large for 16-bit scales")


# ---- plan -----------------------------------------------------------------------------------------------------------


def _plan(model: nn.Module, settings: Settings) -> tuple[list[_Target], dict[str, str]]:
    """Modules to replace, and name -> reason for those that stay."""
    head, embedding = (_method_result(model, name) for name in ("get_output_embeddings", "get_input_embeddings"))
    targets: dict[nn.Module, _Target] = {}
    skipped: dict[str, str] = {}
    closed: list[str] = []  # prefixes of modules that read their children's weights themselves
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _READS_CHILDREN):
            closed.append(name + "." if name else "")
        kind = _kind(module, module is embedding)
        if kind is None:
            continue
        if module in targets:
            targets[module].names.append(name)
            continue
        bits = settings.head_bits if module is head or module is embedding else settings.bits
        if not settings.converts(name) or bits is None:
            skipped[name] = EXCLUDED
        elif any(name.startswith(prefix) for prefix in closed):
            skipped[name] = "its parent reads the weight without calling it"
        else:
            target = _Target([name], module, kind, bits)
            reason = _unsuitable(target)
            if reason:
                skipped[name] = reason
            else:
                targets[module] = target
    return list(targets.values()), skipped


_READS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _method_result(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None


def _kind(module: nn.Module, is_embedding: bool) -> str | None:
    if isinstance(module, (PackedLinear, PackedEmbedding)):
        return None
    if isinstance(module, nn.Linear):
        return "linear"
    hf = sys.modules.get("transformers.pytorch_utils")
    if hf is not None and isinstance(module, hf.Conv1D):
        return "conv1d"
    return "embedding" if is_embedding and isinstance(module, nn.Embedding) else None


def _unsuitable(target: _Target) -> str:
    """Why this module must stay in float, or an empty text. A forward that is not torch's own is tried out."""
    module = target.module
    weight = target.stored
    if not weight.is_floating_point() or weight.dim() != 2 or weight.dtype.itemsize not in (2, 4):
        return f"its weight is {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
    if 0 in weight.shape:
        return f"its weight is empty: {list(weight.shape)}"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrised"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "it renormalises its rows (max_norm)"
        if type(module).forward is nn.Embedding.forward:
            return ""
        target.multiplier = _embedding_multiplier(module)
        return (
            "" if target.multiplier is not None else f"{type(module).__name__} does not compute what nn.Embedding does"
        )
    if target.kind == "conv1d" or type(module).forward is nn.Linear.forward:
        return ""
    if _is_linear_in_effect(cast("nn.Linear", module)):
        return ""
    return f"{type(module).__name__} does not compute what nn.Linear does"


def _is_linear_in_effect(module: nn.Linear) -> bool:
    """Whether a subclass gives x W^T + b in fp32 for small and for large x."""
    try:
        with torch.no_grad():
            probe = copy.deepcopy(module).float()
            x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(0))
            x = torch.cat([x, 100 * x])
            want, got = nn.functional.linear(x, probe.weight, probe.bias), probe(x)
            return (
                isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-4)
            )
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False


def _embedding_multiplier(module: nn.Embedding) -> float | None:
    """The factor by which a subclass scales its rows, None if it does something else; tried on rows of 1 and 2."""
    probe = copy.copy(module)
    rows = torch.ones(2, module.embedding_dim)
    rows[1] = 2
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(rows, requires_grad=False)}
    try:
        with torch.no_grad():
            got = probe(torch.tensor([[0, 1]]))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None
    if not isinstance(got, Tensor) or got.shape != (1, 2, module.embedding_dim):
        return None
    factor = float(got[0, 0, 0])
    return factor if torch.equal(got[0].float(), rows * factor) else None


# ---- swap -----------------------------------------------------------------------------------------------------------


def _swap(model: nn.Module, target: _Target, settings: Settings, packed: dict[int, PackedWeight]) -> None:
    """Replace one module. packed: id of a float weight -> its packed form, so that tied weights stay one copy."""
    module = target.module
    dtype = target.stored.dtype
    key = id(target.stored)
    if key not in packed:
        packed[key] = pack(
            quantize_rtn(
                target.weight,
                target.bits,
                settings.group_size if target.bits == 4 or settings.bits == 8 else 32,
                settings.sym,
                SCALE_DTYPES[settings.scale_dtype],
            )
        )
    new: PackedLinear | PackedEmbedding
    if target.kind == "embedding":
        padding_idx = cast("nn.Embedding", module).padding_idx
        new = PackedEmbedding(packed[key], dtype=dtype, padding_idx=padding_idx, multiplier=target.multiplier)
    else:
        bias = cast("nn.Parameter | None", module.bias)
        new = PackedLinear(packed[key], bias, dtype=dtype, compute=settings.compute)
    new.train(module.training)
    keep_original(new, module)
    for name in target.names:
        _set_module(model, name, new)


def keep_original(packed: PackedLinear | PackedEmbedding, module: nn.Module) -> None:
    """Remember the module that ``packed`` replaces, without its weight: :func:`restore` puts it back."""
    module.__dict__.get("_parameters", {})["weight"] = None
    packed.__dict__["_original"] = module


def _original(module: PackedLinear | PackedEmbedding, weight: nn.Parameter) -> nn.Module:
    """The float module that ``module`` replaced, with this weight [n, k]."""
    original = module.__dict__.get("_original")
    if original is None:
        if isinstance(module, PackedLinear):
            original = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        else:
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


def _freeze(model: nn.Module) -> set[str]:
    """Turn gradients off where they are on, and say where: nothing of an optimised model can be trained."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    return names | getattr(model, "_cpullm_frozen", set())


def _return_free_memory() -> None:
    """Give the freed float weights back to the system: blocks of up to 32 MB glibc would keep for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


_CPU_MAP = {"": torch.device("cpu")}


def _guard(model: nn.Module) -> None:
    """Keep the model on the CPU, whole, and save_pretrained from writing what cannot be loaded."""
    _set_attributes(model, _apply=_GuardedApply(model))
    if not hasattr(model, "save_pretrained"):
        return
    if torch.accelerator.is_available() and not hasattr(model, "hf_device_map"):
        _set_attributes(model, hf_device_map=dict(_CPU_MAP))  # pipelines look here before they move a model to a GPU
    _set_attributes(model, save_pretrained=_refuse_to_save)


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


def _refuse_to_save(*args: object, **kwargs: object) -> None:
    raise RuntimeError(
        "save_pretrained of an optimised model is not supported by this version of torch_cpullm; "
        "save the float model before torch_cpullm.optimize(model)"
    )


def _progress_disabled() -> bool | None:
    """True where HuggingFace's switches turn progress bars off; None lets tqdm look for a terminal."""
    hub = sys.modules.get("huggingface_hub.utils")
    if hub is not None and hub.are_progress_bars_disabled():
        return True
    logging_module = sys.modules.get("transformers.utils.logging")
    if logging_module is not None and not logging_module.is_progress_bar_enabled():
        return True
    return None


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedLinear | PackedEmbedding]]:
    """(name, module) of every packed module of ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            yield name, module
