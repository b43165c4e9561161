"""optimize(model): every linear layer of a model to packed INT4, in place, and back."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import ops
from .config import SCALE_DTYPES, Settings
from .launch import apply_default_threads
from .linear import PackedEmbedding, PackedLinear
from .packing import PackedWeight, pack
from .quant import quantize_rtn
from .coverage import EXCLUDED, Report, report

log = logging.getLogger("torch_cpullm")


@dataclass
class _Target:
    """A module to replace. weight is [n, k] whatever the module stores."""

    name: str
    module: nn.Module
    kind: str  # linear, conv1d or embedding
    bits: int
    multiplier: float | None = None  # of an embedding that scales its rows

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight.detach()
        return weight.T if self.kind == "conv1d" else weight


def optimize(model: nn.Module, config: Settings | None = None, *, strict: bool = False) -> nn.Module:
    """Replace every linear layer of ``model`` by one with packed INT4 weights, and its head and input embedding by INT8.

    Works in place and returns ``model``; ``generate()`` and pipelines work as before. nn.Linear, transformers' Conv1D and
    subclasses of nn.Linear that behave like it are replaced; everything else stays and :func:`report` says why. The float
    weights are freed as it goes; :func:`restore` gives a float model back (of the quantised values). A second call with the
    same settings does nothing. Sets torch's thread count once per process unless the user has
    (:func:`torch_cpullm.launch.apply_default_threads`).

    config: :class:`torch_cpullm.CpuLlmConfig` or :class:`torch_cpullm.config.Settings`; default INT4, group 32, zero
    points, int8 compute. strict: raise instead of leaving a weight matrix in float.

    Raises TypeError or ValueError, before anything is changed: ``model`` is no module, is on another device or on meta, is
    quantised by another method or with other settings, holds NaN or inf (named), or ``strict`` cannot be met. Raises
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
        planned = {target.name for target in targets}
        left = [row for row in _with_reasons(model, skipped).left_in_float if row.name not in planned]
        if left:
            lines = "\n".join(f"  {row.name}: {row.reason}" for row in left[:8])
            more = f"\n  and {len(left) - 8} more" if len(left) > 8 else ""
            raise ValueError(f"strict=True, but these weights would stay in float:\n{lines}{more}")
    apply_default_threads()
    model.eval()
    model._cpullm_settings = settings
    model._cpullm_skipped = skipped
    packed: dict[int, PackedWeight] = {}
    for target in tqdm(targets, desc="torch_cpullm", unit="module", disable=_progress_disabled()):
        _swap(model, target, settings, packed)
    _keep_on_cpu(model)
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

    The original float values are gone; the model computes with what INT4 made of them. Returns ``model``; a model that was
    never optimised is returned as it is.
    """
    weights: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, (PackedLinear, PackedEmbedding)):
            continue
        key = (id(module.packed), module.dtype)
        if key not in weights:
            weights[key] = nn.Parameter(ops.dequantize(module.packed).to(module.dtype), requires_grad=False)
        _set_module(model, name, _original(module, weights[key]))
    for name in ("_cpullm_settings", "_cpullm_skipped", "save_pretrained", "hf_device_map"):
        model.__dict__.pop(name, None)
    return model


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_model(model: nn.Module, settings: Settings) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    before = getattr(model, "_cpullm_settings", None)
    if before is not None and not before.same_quantization(settings):
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
        weight = target.module.weight
        low, high = torch.aminmax(weight.detach())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError(f"the weight of {target.name} holds NaN or inf")
        if float(torch.maximum(-low, high)) > 65504:
            raise ValueError(f"the weight of {target.name} holds values beyond 65504, too large for 16-bit scales")


# ---- plan -----------------------------------------------------------------------------------------------------------


def _plan(model: nn.Module, settings: Settings) -> tuple[list[_Target], dict[str, str]]:
    """Modules to replace, and name -> reason for those that stay."""
    head, embedding = (_method_result(model, name) for name in ("get_output_embeddings", "get_input_embeddings"))
    targets: list[_Target] = []
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = _kind(module, module is embedding)
        if kind is None:
            continue
        bits = settings.head_bits if module is head or module is embedding else settings.bits
        if not settings.converts(name) or bits is None:
            skipped[name] = EXCLUDED
            continue
        target = _Target(name, module, kind, bits)
        reason = _unsuitable(target)
        if reason:
            skipped[name] = reason
        else:
            targets.append(target)
    return targets, skipped


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
    """Why this module must stay in float, or an empty text. Subclasses are tried against what they claim to be."""
    module = target.module
    weight = module.weight
    if not weight.is_floating_point() or weight.dim() != 2 or weight.dtype.itemsize not in (2, 4):
        return f"its weight is {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
    if 0 in weight.shape:
        return f"its weight is empty: {list(weight.shape)}"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrised"
    if target.kind == "linear" and type(module) is not nn.Linear:
        with torch.no_grad():
            x = torch.linspace(-1, 1, 3 * module.in_features, dtype=weight.dtype).view(3, -1)
            want = nn.functional.linear(x, weight, module.bias)
            if not _same_result(module, x, want):
                return f"{type(module).__name__} does not compute what nn.Linear does"
    if target.kind == "embedding" and type(module) is not nn.Embedding:
        with torch.no_grad():
            ids = torch.arange(min(8, weight.shape[0]))
            rows = weight[ids]
            got = module(ids)
            peak = int(rows.abs().argmax())
            if got.shape == rows.shape and float(rows.flatten()[peak]) != 0:
                target.multiplier = float(got.flatten()[peak] / rows.flatten()[peak])
            if target.multiplier is None or not _same_result(module, ids, rows * target.multiplier):
                return f"{type(module).__name__} does not compute what nn.Embedding does"
    return ""


def _same_result(module: nn.Module, x: Tensor, want: Tensor) -> bool:
    got = module(x)
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=2e-2, atol=1e-5)


# ---- swap -----------------------------------------------------------------------------------------------------------


def _swap(model: nn.Module, target: _Target, settings: Settings, packed: dict[int, PackedWeight]) -> None:
    """Replace one module. packed: id of a float weight -> its packed form, so that tied weights stay one copy."""
    module = target.module
    dtype = module.weight.dtype
    key = id(module.weight)
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
        new = PackedEmbedding(
            packed[key], dtype=dtype, padding_idx=module.padding_idx, multiplier=target.multiplier
        )
    else:
        new = PackedLinear(packed[key], module.bias, dtype=dtype, compute=settings.compute)
    new.train(module.training)
    keep_original(new, module)
    _set_module(model, target.name, new)


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
            original.bias = module.bias
        else:
            original = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
    transposed = not isinstance(original, (nn.Linear, nn.Embedding))
    original.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False) if transposed else weight
    if isinstance(module, PackedLinear):
        original.bias = module.bias
    return original.train(module.training)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _keep_on_cpu(model: nn.Module) -> None:
    """Keep pipelines on the CPU where there is an accelerator, and save_pretrained from writing what cannot be loaded."""
    if not hasattr(model, "save_pretrained"):
        return
    if torch.accelerator.is_available() and not hasattr(model, "hf_device_map"):
        model.hf_device_map = {"": torch.device("cpu")}
    model.save_pretrained = _refuse_to_save


def _refuse_to_save(*args: object, **kwargs: object) -> None:
    raise RuntimeError(
        "save_pretrained of an optimised model is not supported by this version of torch_cpullm; "
        "save the float model before torch_cpullm.optimize(model)"
    )


def _with_reasons(model: nn.Module, skipped: dict[str, str]) -> Report:
    model._cpullm_skipped = skipped
    try:
        return report(model)
    finally:
        del model._cpullm_skipped


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
