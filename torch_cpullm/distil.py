"""Scales, gains and codes learnt after rounding: the float model teaches the quantised one.

    loss = KL(float || quantised)        scale = scale_0 (1 + t), Adam on t and on the gains of the norms
                                         code = round(c), Adam on c; rounding's derivative counts as one

Needs the whole model, the gradients of one linear after another, and about eight times the arithmetic of a forward
pass per token; with codes also 16 bytes per weight, 20 where steps are averaged. Source: Chen et al. 2024,
"EfficientQAT" (its second phase); the float model as the teacher, and codes: LLM-QAT, Liu et al. 2023; the mean over
steps: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima".
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .calibrated import Calibrated
from .checkpoint import Form
from .devices import device_of, model_on
from .layerwise import Method, calibrate, decoder_layers
from .packing import QuantizedWeight, dequantize, pack, resolve_group, unpack
from .quality import check_ids
from .quant.groups import as_groups
from .trial import twin

log = logging.getLogger("torch_cpullm")

RATE, CODE_RATE = 0.003, 0.02
ROUNDED = 128  # sequences that rounding looks at, where there are more to learn from
_LOGITS = 2 << 30  # bytes of float32 logits at once, on other devices than the CPU
_WORTH = 64  # steps from which on recording one for replay pays


def some_of(ids: Tensor, count: int) -> Tensor:
    """``count`` rows of ids [sequences, s], evenly spaced; all of fewer."""
    count = min(count, len(ids))
    return ids[torch.arange(count) * len(ids) // count] if count else ids


def quantize_model(
    model: nn.Module,
    ids: Tensor,
    forms: Mapping[str, Form],
    method: Method,
    *,
    folder: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Calibrated:
    """:func:`torch_cpullm.layerwise.calibrate` on ROUNDED of ``ids``, then :func:`distil` on all of them."""
    found = calibrate(model, some_of(ids, ROUNDED), forms, method, folder=folder, device=device, progress=progress)
    if not method.epochs:
        return found
    return distil(model, found, ids, epochs=method.epochs, codes=method.codes, device=device, progress=progress)


def distil(
    model: nn.Module,
    found: Calibrated,
    ids: Tensor,
    *,
    epochs: int = 1,
    rate: float = RATE,
    codes: bool = False,
    code_rate: float = CODE_RATE,
    average: float = 0.0,
    batch: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Calibrated:
    """``found`` with scales of the decoder's linears, and gains of its norms, that lower KL(model || quantised) on ids.

    model: float, of transformers; it stays as it is. found: of :func:`torch_cpullm.layerwise.calibrate`, for it. ids:
    int64 [sequences, s], never what will be reported. rate: of Adam, relative to each value; it falls to 0 linearly.
    codes: whether codes learn as well, ``code_rate`` levels a step at first; many tokens are needed, since they can
    learn these by heart. average: what is kept is the mean over this share of the steps, the last ones, before codes
    are rounded; 0 for what the last step gave. It pays where there are a thousand steps, not where there are a hundred.
    batch: sequences of a step; None: 2, and up to 16 where there are many. device: where both models compute; None:
    where the model is. dtype: of products and attention, by torch.autocast; None: bfloat16 on a GPU that has it, else
    float32. Losses, scales, codes and Adam are in float32. Zero points and minima stay, and so does the size; experts
    are taken as float. The same arguments give the same values on one machine with one number of threads.

    Raises ValueError: ids no tokens of the model, epochs, batch, a rate or average out of range, a dtype that is
    neither bfloat16 nor float32, a model that is not of transformers, a device that is not there, a loss that is no
    number.
    """
    ids = check_ids(ids, model)
    if ids.dim() != 2:
        raise ValueError(f"ids must be [sequences, tokens], got {list(ids.shape)}")
    batch = max(2, min(16, len(ids) // 128)) if batch is None else batch
    for name, count in (("epochs", epochs), ("batch", batch)):
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}")
    for name, number in (("rate", rate), ("code_rate", code_rate)):
        if not 0 < number < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {number!r}")
    if not 0 <= average <= 1:
        raise ValueError(f"average must lie in 0..1, got {average!r}")
    if not hasattr(model, "config"):
        raise ValueError(f"distilling needs a model of transformers, got {type(model).__name__}")
    if dtype not in (None, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float32, got {dtype!r}")
    prefix, _ = decoder_layers(model)
    model = model_on(model, device)
    place = device_of(model)
    if dtype is None:
        dtype = torch.bfloat16 if place.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    student = twin(model).eval()
    values = dict(student.named_parameters())
    for name, value in found.parameters.items():
        values[name].data = value.to(place, values[name].dtype)
    learners: dict[str, _Linear] = {}
    for name, packed in found.packed.items():
        module = student.get_submodule(name)
        if name.startswith(prefix + "."):
            bias = cast("Tensor | None", getattr(module, "bias", None))
            learners[name] = _Linear(unpack(packed).to(place), bias, codes)
            student.set_submodule(name, learners[name])
        else:
            stored = cast("nn.Parameter", module.weight)
            weight = dequantize(packed).to(place, stored.dtype)
            stored.data = weight if isinstance(module, (nn.Linear, nn.Embedding)) else weight.T
    gains = {name: value for name, value in values.items() if value.dim() == 1 and name.endswith(".weight")}
    for value in gains.values():
        value.data = value.detach().clone()
        value.requires_grad_()
    groups: list[dict[str, Any]] = [{"params": [learner.change for learner in learners.values()], "lr": rate}]
    groups += [{"params": [gain], "lr": rate * float(gain.detach().abs().mean())} for gain in gains.values()]
    if codes:
        groups.append({"params": [learner.levels for learner in learners.values()], "lr": code_rate})
    steps = [rows for _ in range(epochs) for rows in ids.split(batch)]
    _learn(model, student, steps, list(learners.values()), groups, average, dtype, progress)
    result = Calibrated(dict(found.packed), dict(found.parameters))
    result.packed |= {name: pack(learner.quantized().to("cpu")) for name, learner in learners.items()}
    result.parameters |= {name: value.detach().float().cpu() for name, value in gains.items()}
    return result


def _learn(
    model: Any,
    student: Any,
    steps: Sequence[Tensor],
    learners: Sequence[_Linear],
    groups: list[dict[str, Any]],
    average: float,
    dtype: torch.dtype,
    progress: bool,
) -> None:
    """Adam on what learns, and the mean over the last steps.

    The sequences of a step go in parts, so that few logits are in memory: on the CPU of one.
    """
    place = device_of(model)
    learning = [value for group in groups for value in group["params"]]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    backward = _backward(model, student, dtype)
    length, vocabulary = steps[0].shape[1], model.config.get_text_config().vocab_size
    together = 1 if place.type == "cpu" else max(1, _LOGITS // (4 * length * vocabulary))
    together = min(together, len(steps[0]))
    recorded = None
    if place.type == "cuda" and len(steps) >= _WORTH:
        recorded = _recorded(backward, steps[0][:together].to(place), learning)
    counted = round(average * len(steps))
    sums = [torch.zeros_like(value) for value in learning] if counted else []
    bar = tqdm(steps, desc="distil", unit="step", disable=not progress)
    for number, rows in enumerate(bar):
        optimizer.zero_grad(set_to_none=recorded is None)
        total = torch.zeros((), device=place)
        for part in rows.to(place).split(together):
            run = recorded if recorded is not None and len(part) == together else backward
            total += run(part, len(part) / len(rows))
        optimizer.step()
        schedule.step()
        for learner in learners:
            learner.keep_in_range()
        if counted and number >= len(steps) - counted:
            with torch.no_grad():
                torch._foreach_add_(sums, learning)
        value = float(total)  # only here: a GPU is waited for once a step
        if not math.isfinite(value):
            raise ValueError(f"distilling: the loss is {value}; the quantised model or the tokens are damaged")
        bar.set_postfix(kl=f"{value:.4f}")
    with torch.no_grad():
        for value, total in zip(learning, sums, strict=counted > 0):
            value.copy_(total / counted)


_Backward = Callable[[Tensor, "float | Tensor"], Tensor]


def _backward(model: Any, student: Any, dtype: torch.dtype) -> _Backward:
    """(ids [rows, s], share) -> share times the KL of these rows; its gradients are added to those of the student."""

    def run(ids: Tensor, share: float | Tensor) -> Tensor:
        with _cast(ids.device, dtype), torch.no_grad():
            wanted = model(ids, use_cache=False).logits
        wanted = wanted.flatten(0, 1).float().log_softmax(-1)
        with torch.enable_grad():
            with _cast(ids.device, dtype):
                logits = student(ids, use_cache=False).logits
            learnt = logits.flatten(0, 1).float().log_softmax(-1)
            loss = nn.functional.kl_div(learnt, wanted, log_target=True, reduction="batchmean") * share
            loss.backward()
        return loss.detach()

    return run


def _cast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``dtype``, for as long as the context lasts; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)


def _recorded(backward: _Backward, ids: Tensor, learning: Sequence[nn.Parameter]) -> _Backward | None:
    """``backward`` as a CUDA graph for ids of this shape; None, and a warning, where the model cannot be recorded.

    A small model's kernels are shorter than what it takes to launch them one by one.
    """
    share = torch.ones((), device=ids.device)
    ids = ids.clone()
    for value in learning:  # recorded is the addition to these tensors
        value.grad = torch.zeros_like(value)
    side, graph = torch.cuda.Stream(ids.device), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream(ids.device))
    with torch.cuda.stream(side):  # a recording that fails does not leave it
        for _ in range(2):  # libraries make their handles and workspaces
            backward(ids, share)
        try:
            with torch.cuda.graph(graph, stream=side):
                loss = backward(ids, share)
        except RuntimeError as error:
            log.warning("distil: steps are not recorded, and slower: %s", str(error).splitlines()[0])
            return None
    torch.cuda.current_stream(ids.device).wait_stream(side)

    def replay(part: Tensor, weight: float | Tensor) -> Tensor:
        ids.copy_(part)
        share.fill_(weight)
        graph.replay()
        return loss

    return replay


class _Linear(nn.Module):
    """A linear whose scales, and with ``codes`` whose codes, learn. levels: codes without the zero point."""

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None, codes: bool = False) -> None:
        super().__init__()
        group = resolve_group(quantized.group_size, quantized.k)
        self.first, self.bias, self.pad = quantized, bias, -quantized.k % group
        self.base: Tensor | None = None
        middle: Any = 1 << (quantized.bits - 1)
        if quantized.zeros is not None and quantized.zeros.dtype == torch.uint8:
            middle = quantized.zeros.to(torch.int16)[..., None]
        elif quantized.zeros is not None:
            middle, self.base = 0, quantized.zeros.float()
        self.middle = middle
        levels = (as_groups(quantized.codes.to(torch.int16), group) - middle).to(torch.int8)
        self.levels = nn.Parameter(levels.float()) if codes else levels
        self.change = nn.Parameter(torch.zeros_like(quantized.scales, dtype=torch.float32))

    def scale(self) -> Tensor:
        """The scales as they are now, [n, groups]."""
        return self.first.scales.float() * (1 + self.change)

    def quantized(self) -> QuantizedWeight:
        """The weight with these scales and codes."""
        scales, codes = self.scale().detach().to(self.first.scales.dtype), self.first.codes
        if isinstance(self.levels, nn.Parameter):
            found = (self.levels.detach().round() + self.middle).flatten(1)[:, : self.first.k]
            codes = found.to(torch.uint8).contiguous()
        return replace(self.first, scales=scales, codes=codes)

    def keep_in_range(self) -> None:
        """Levels that learn, back to those that have a code."""
        if isinstance(self.levels, nn.Parameter):
            with torch.no_grad():
                self.levels.copy_((self.levels + self.middle).clamp_(0, (1 << self.first.bits) - 1) - self.middle)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., k] -> [.., n]."""
        if torch.is_autocast_enabled(x.device.type):  # here, so that the gradient is cast back
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = nn.functional.pad(x, (0, self.pad)) if self.pad else x
        y = cast("Tensor", _Product.apply(x, self.levels, self.scale(), self.base))
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """``x W^T``, W = scale * round(levels) + base; of the weight only levels and scales are kept for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor, scale: Tensor, base: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, levels, scale, base)
        return x @ _weight(levels, scale, base).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        x, levels, scale, base = ctx.saved_tensors
        by_x = gradient @ _weight(levels, scale, base).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        by_weight = as_groups((gradient.flatten(0, -2).T @ x.flatten(0, -2)).float(), levels.shape[-1])
        by_levels = by_weight * scale[..., None] if ctx.needs_input_grad[1] else None
        return by_x, by_levels, (by_weight * _rounded(levels)).sum(-1), None


def _rounded(levels: Tensor) -> Tensor:
    return levels.round() if levels.is_floating_point() else levels


def _weight(levels: Tensor, scale: Tensor, base: Tensor | None) -> Tensor:
    """[n, groups * group] of levels [n, groups, group], scale and base [n, groups]."""
    w = _rounded(levels) * scale[..., None]
    return (w if base is None else w + base[..., None]).flatten(1)
