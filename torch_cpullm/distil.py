"""Scales and gains learnt after rounding: the float model teaches the quantised one, codes stay as they are.

    loss = KL(float || quantised)        scale = scale_0 (1 + t), Adam on t and on the gains of the norms

Needs the whole model, the gradients of one linear after another, and about eight times the arithmetic of a forward
pass per token. Source: Chen et al. 2024, "EfficientQAT" (its second phase); the float model as the teacher: LLM-QAT,
Liu et al. 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .calibrated import Calibrated
from .checkpoint import Form
from .layerwise import Method, calibrate, decoder_layers
from .packing import QuantizedWeight, dequantize, pack, resolve_group, unpack
from .quality import check_ids
from .quant.groups import as_groups
from .trial import twin

RATE = 0.003
_TOGETHER = 2  # sequences of a step


def quantize_model(
    model: nn.Module,
    ids: Tensor,
    forms: Mapping[str, Form],
    method: Method,
    *,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Calibrated:
    """:func:`torch_cpullm.layerwise.calibrate`, then :func:`distil` for as many epochs as ``method`` says."""
    found = calibrate(model, ids, forms, method, folder=folder, progress=progress)
    return distil(model, found, ids, epochs=method.epochs, progress=progress) if method.epochs else found


def distil(
    model: nn.Module, found: Calibrated, ids: Tensor, *, epochs: int = 1, rate: float = RATE, progress: bool = True
) -> Calibrated:
    """``found`` with scales of the decoder's linears, and gains of its norms, that lower KL(model || quantised) on ids.

    model: float, of transformers; it stays as it is. found: of :func:`torch_cpullm.layerwise.calibrate`, for it. ids:
    int64 [sequences, s], never what will be reported. rate: of Adam, relative to each value; it falls to 0 linearly.
    Codes, zero points and minima stay, and so does the size; experts are taken as float. The same arguments give the
    same values on one machine with one number of threads.

    Raises ValueError: ids no tokens of the model, epochs or rate out of range, a model that is not of transformers, a
    loss that is no number.
    """
    ids = check_ids(ids, model)
    if ids.dim() != 2:
        raise ValueError(f"ids must be [sequences, tokens], got {list(ids.shape)}")
    if type(epochs) is not int or epochs < 1 or not 0 < rate < 1:
        raise ValueError(f"epochs must be a positive integer and rate between 0 and 1, got {epochs!r} and {rate!r}")
    if not hasattr(model, "config"):
        raise ValueError(f"distilling needs a model of transformers, got {type(model).__name__}")
    prefix, _ = decoder_layers(model)
    student = twin(model).eval()
    values = dict(student.named_parameters())
    for name, value in found.parameters.items():
        values[name].data = value.to(values[name].dtype)
    learners: dict[str, _Linear] = {}
    for name, packed in found.packed.items():
        module = student.get_submodule(name)
        if name.startswith(prefix + "."):
            learners[name] = _Linear(unpack(packed), cast("Tensor | None", getattr(module, "bias", None)))
            student.set_submodule(name, learners[name])
        else:
            stored = cast("nn.Parameter", module.weight)
            weight = dequantize(packed).to(stored.dtype)
            stored.data = weight if isinstance(module, (nn.Linear, nn.Embedding)) else weight.T
    gains = {name: value for name, value in values.items() if value.dim() == 1 and name.endswith(".weight")}
    for value in gains.values():
        value.data = value.detach().clone()
        value.requires_grad_()
    _learn(model, student, ids, list(learners.values()), list(gains.values()), epochs, rate, progress)
    result = Calibrated(dict(found.packed), dict(found.parameters))
    result.packed |= {name: pack(learner.quantized()) for name, learner in learners.items()}
    result.parameters |= {name: value.detach().float() for name, value in gains.items()}
    return result


def _learn(
    model: Any,
    student: Any,
    ids: Tensor,
    learners: Sequence[_Linear],
    gains: Sequence[Tensor],
    epochs: int,
    rate: float,
    progress: bool,
) -> None:
    """Adam on what learns; the sequences of a step one after another, so that the logits of one are in memory."""
    groups: list[dict[str, Any]] = [{"params": [learner.change for learner in learners], "lr": rate}]
    groups += [{"params": [gain], "lr": rate * float(gain.detach().abs().mean())} for gain in gains]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    steps = [rows for _ in range(epochs) for rows in ids.split(_TOGETHER)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    bar = tqdm(steps, desc="distil", unit="step", disable=not progress)
    for rows in bar:
        optimizer.zero_grad()
        total = 0.0
        for row in rows:
            with torch.no_grad():
                wanted = model(row[None], use_cache=False).logits[0].float().log_softmax(-1)
            with torch.enable_grad():
                logits = student(row[None], use_cache=False).logits[0].float()
                loss = nn.functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
                (loss / len(rows)).backward()
            total += float(loss.detach()) / len(rows)
        if not math.isfinite(total):
            raise ValueError(f"distilling: the loss is {total}; the quantised model or the tokens are damaged")
        bar.set_postfix(kl=f"{total:.4f}")
        optimizer.step()
        schedule.step()


class _Linear(nn.Module):
    """A linear with given codes whose scales learn."""

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        group = resolve_group(quantized.group_size, quantized.k)
        self.first, self.bias, self.pad = quantized, bias, -quantized.k % group
        self.base: Tensor | None = None
        middle: Any = 1 << (quantized.bits - 1)
        if quantized.zeros is not None and quantized.zeros.dtype == torch.uint8:
            middle = quantized.zeros.to(torch.int16)[..., None]
        elif quantized.zeros is not None:
            middle, self.base = 0, quantized.zeros.float()
        self.levels = (as_groups(quantized.codes.to(torch.int16), group) - middle).to(torch.int8)
        self.change = nn.Parameter(torch.zeros(quantized.scales.shape))

    def scale(self) -> Tensor:
        """The scales as they are now, [n, groups]."""
        return self.first.scales.float() * (1 + self.change)

    def quantized(self) -> QuantizedWeight:
        """The weight with these scales."""
        return replace(self.first, scales=self.scale().detach().to(self.first.scales.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., k] -> [.., n]."""
        x = nn.functional.pad(x, (0, self.pad)) if self.pad else x
        y = cast("Tensor", _Product.apply(x, self.levels, self.scale(), self.base))
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """``x W^T``, W = scale * levels + base; of the weight only levels and scales are kept for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor, scale: Tensor, base: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, levels, scale, base)
        return x @ _weight(levels, scale, base).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor, None]:
        x, levels, scale, base = ctx.saved_tensors
        by_x = gradient @ _weight(levels, scale, base).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        by_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float()
        return by_x, None, (as_groups(by_weight, levels.shape[-1]) * levels).sum(-1), None


def _weight(levels: Tensor, scale: Tensor, base: Tensor | None) -> Tensor:
    """[n, groups * group] of levels int8 [n, groups, group], scale and base [n, groups]."""
    w = levels * scale[..., None]
    return (w if base is None else w + base[..., None]).flatten(1)
