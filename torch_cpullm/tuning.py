"""The automatic flow: methods from cheap to dear, each measured, until the loss is within the target.

    RTN -> HQQ -> AWQ + clip -> GPTQ -> AWQ + GPTQ, refined -> distilled -> codes too
    -> the last of them in mixed precision, with more and more bits

Source of the flow: Shen et al. 2023, "Efficient LLM Inference on CPUs" (try a recipe, evaluate, tune again).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calibrated import Calibrated
from .calibration import LENGTH, calibration_ids, self_generated, text_ids
from .checkpoint import Form
from .config import Settings
from .devices import model_on, usable
from .distil import ROUNDED, distil, some_of
from .folding import matrix
from .layer_group import member_of
from .layerwise import Method, calibrate
from .quality import check_ids, evaluate
from .sensitivity import allocate, sensitivities, stored_bits
from .swap import check_model
from .trial import Experts, apply, experts_of, forms_of, settings_of, twin
from .tune_report import Step, Tuned

log = logging.getLogger("torch_cpullm")

LADDER = (
    Method("rtn"),
    Method("hqq"),
    Method("clip", "awq"),
    Method("gptq"),
    Method("gptq", "awq", sweeps=2),
    Method("gptq", "awq", sweeps=2, epochs=1),
)
LAST = Method("gptq", "awq", sweeps=2, epochs=2, codes=True)  # where there are MANY sequences, for codes to learn from
SEQUENCES, MANY = 64, 2048  # on the CPU, and on a faster device
BUDGETS = (5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0)  # bits per weight of mixtures; the last one has ``budget_bits``
_HOPELESS = 2.0  # a mixture foretold to miss the target by this factor is passed over
_HELD_OUT = 8  # sequences of the default evaluation
_WINDOW = 2048

Measure = Callable[[nn.Module], float]


def autotune(
    model: nn.Module,
    tokenizer: Any = None,
    target: float = 0.01,
    eval: Measure | str | Path | Tensor | None = None,  # the name that users know
    calibration: Any = None,
    budget_bits: float = 5.0,
    *,
    config: Settings | None = None,
    methods: Sequence[Method] | None = None,
    higher_is_better: bool = False,
    sequences: int | None = None,
    length: int = LENGTH,
    seed: int = 0,
    folder: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Tuned:
    """Quantise ``model`` in place by the cheapest method whose loss is at most ``target`` worse than the float model's.

    Methods are tried in order, on a second model that shares the first one's memory; each result is measured with the
    compute that ``config`` asks for. The first within the target is taken. If none is, bits are added where they matter
    (:mod:`torch_cpullm.sensitivity`): mixtures of BUDGETS bits, rising up to ``budget_bits``, are calibrated by the
    last method until one is within the target; those that the sensitivities foretell to miss it by far are passed over.
    Else the best of all is kept; ``met`` is False then, and a warning says so.

    target: relative: 0.01 allows a perplexity of 1.01 times the float model's. eval: a text, the path of one, token
    ids, or a function model -> number, lower is better unless ``higher_is_better``; None: text that the float model has
    generated itself, with another seed than the calibration's. Never pass what you will report, nor the calibration
    text. calibration: see :func:`torch_cpullm.calibration.calibration_ids`; sequences, length: how much of it, 64 or on
    another device than the CPU 2,048 sequences. methods: None for LADDER and, from 2,048 sequences on, LAST.
    budget_bits: most stored bits per weight of the decoder's linears; forms beyond it are not tried; 8.5 for whatever
    the target takes. config: settings otherwise (bits must be 4). Experts are rounded to nearest by every method, in
    the form of ``config``; they count in the bits, and the report says so. folder: where finished layers are kept, so
    that a stopped run can go on. device: where the float model computes and is calibrated, such as "cuda", on a copy;
    quantised models are always packed and measured on the CPU.

    Returns :class:`Tuned`: the model, every step with its numbers, and ``save(folder)`` for the report. The same
    arguments and seed give the same result. Raises ValueError for wrong arguments, unusable data, an eval function
    that returns no finite number, a device that is not there; what that function raises is passed on. The float model
    is untouched by any error.
    """
    settings = config if config is not None else Settings()
    if sequences is None:
        sequences = SEQUENCES if device is None or usable(device).type == "cpu" else MANY
    own_ladder = methods is None
    if methods is None:
        methods = LADDER if sequences < MANY else (*LADDER, LAST)
    _check_arguments(model, settings, target, budget_bits, methods)
    experts = experts_of(model, settings)
    forms = _base_forms(model, settings, experts, budget_bits)
    inside = _decoder_names(model, forms)
    model.eval()
    fast = model_on(model, device)  # the float model where it computes
    measure, what = _measure(eval, fast, tokenizer, length, seed)
    baseline = _number(measure(model if callable(eval) else fast), "the float model")
    if baseline == 0:
        raise ValueError("the float model's measure is 0: a relative target means nothing; return another measure")
    tuned = Tuned(model, target, what, baseline, seed)
    ids: Tensor | None = None
    best: tuple[float, Calibrated, Settings] | None = None
    made: tuple[Method, Mapping[str, Form], Calibrated] | None = None  # what a distilled step begins with

    def tokens() -> Tensor:
        nonlocal ids
        if ids is None:
            ids = calibration_ids(calibration, tokenizer, fast, sequences=sequences, length=length, seed=seed)
        return ids

    def attempt(method: Method, forms: Mapping[str, Form], kind: str = "") -> bool:
        nonlocal best, made
        plain, name = replace(method, epochs=0, codes=False), f"{method}{kind}"
        start = time.perf_counter()
        used = tokens() if method.needs_data else torch.zeros(1, 1, dtype=torch.int64)
        if made is None or made[:2] != (plain, forms):
            own = None if folder is None else Path(folder) / f"{plain}{kind}".replace(" ", "").replace(",", "-")
            made = plain, forms, calibrate(fast, some_of(used, ROUNDED), forms, plain, folder=own, progress=progress)
        found = made[2]
        if method.epochs:
            found = distil(fast, found, used, epochs=method.epochs, codes=method.codes, progress=progress)
        seconds = time.perf_counter() - start
        own_settings = settings_of(model, forms, settings)
        value = _number(measure(apply(twin(model), found, own_settings)), name)
        change = (baseline - value if higher_is_better else value - baseline) / abs(baseline)
        stored, weights = _stored(model, {key: forms[key] for key in inside}, experts)
        size = sum(t.nbytes for packed in _unique(found) for t in packed) + _stored(model, {}, experts)[0] // 8
        tuned.steps.append(Step(name, value, change, stored / weights, size, seconds, _counts(forms, inside, experts)))
        log.info("autotune: %s", tuned.steps[-1])
        if best is None or change < best[0]:
            best = change, found, own_settings
        return change <= target

    possible = [method for method in methods if not method.epochs or hasattr(model, "config")]
    if len(possible) < len(methods):
        log.warning("autotune: distilled methods are left out, they need a model of transformers")

    def enough(method: Method) -> bool:
        """A text may be shorter than asked for: too short for codes to learn from."""
        return not (own_ladder and method.codes) or len(tokens()) >= MANY

    met = any(attempt(method, forms) for method in possible if enough(method))
    if not met:
        last = next((method for method in reversed(possible) if method.needs_data and enough(method)), methods[0])
        mixtures: list[_Mixture] = []
        rate = 0.0  # change per nat of estimated KL, of what was tried last
        if hasattr(model, "config"):  # others give no gradients
            mixtures, kl = _mixtures(fast, forms, inside, experts, budget_bits, tokens(), seed, progress)
            change = next(step.change for step in tuned.steps if step.name == str(last))
            rate = change / kl if kl > 0 else 0.0
        for budget, mixed, kl in mixtures:
            if rate * kl > _HOPELESS * target and budget != mixtures[-1][0]:
                continue
            met = attempt(last, mixed, f", mixed to {budget:g}")
            if met:
                break
            rate = tuned.steps[-1].change / kl if kl > 0 else 0.0
    assert best is not None
    apply(model, best[1], best[2])
    if not met:
        log.warning("autotune: no method met the target; %s", tuned.verdict)
    return tuned


# ---- forms ----------------------------------------------------------------------------------------------------------


def _choices(settings: Settings) -> list[Form]:
    """Forms to mix, smallest first."""
    zeros = "none" if settings.sym else "point"
    small = [Form(4, group, zeros, settings.scale_dtype) for group in (128, 64, 32)]
    return [*small, *(Form(8, group, "none", settings.scale_dtype) for group in (128, 32))]


def _base_forms(
    model: nn.Module, settings: Settings, experts: Mapping[str, Experts], budget_bits: float
) -> dict[str, Form]:
    """The forms of ``settings`` or, where these are beyond the budget, the largest of :func:`_choices` that is not."""
    forms = forms_of(model, settings)
    inside = _decoder_names(model, forms)
    if not inside:
        raise ValueError("the model has no linear layers in its decoder to quantise")
    for form in (None, *reversed(_choices(settings)[:3])):
        tried = forms if form is None else {name: form if name in inside else own for name, own in forms.items()}
        stored, weights = _stored(model, {name: tried[name] for name in inside}, experts)
        if stored <= budget_bits * weights:
            return tried
    also = ", its experts in the form of config" if experts else ""
    raise ValueError(f"budget_bits={budget_bits:g} is below what the smallest 4-bit form of this model needs{also}")


def _decoder_names(model: nn.Module, forms: Mapping[str, Form]) -> list[str]:
    ends = [getattr(model, name, lambda: None)() for name in ("get_output_embeddings", "get_input_embeddings")]
    return [name for name in forms if not any(model.get_submodule(name) is end for end in ends)]


def _stored(model: nn.Module, forms: Mapping[str, Form], experts: Mapping[str, Experts]) -> tuple[int, int]:
    """(stored bits, number) of the weights of the modules in ``forms`` and of ``experts``."""
    shapes = [(form, 1, *matrix(model.get_submodule(name)).shape) for name, form in forms.items()]
    shapes += [(each.form, *shape) for each in experts.values() for shape in each.shapes]
    bits = sum(count * stored_bits(form, n, k) for form, count, n, k in shapes)
    return bits, sum(count * n * k for _, count, n, k in shapes)


def _counts(forms: Mapping[str, Form], names: Sequence[str], experts: Mapping[str, Experts]) -> dict[str, int]:
    """How many modules have which form, in words."""
    words = {"none": "symmetric", "point": "zero points", "minimum": "minima"}
    found: dict[str, int] = {}
    both = [(forms[name], "") for name in names]
    both += [(each.form, " (experts, rounded to nearest)") for each in experts.values()]
    for form, note in both:
        key = f"INT{form.bits} g{form.group_size} {words[form.zeros]}{note}"
        found[key] = found.get(key, 0) + 1
    return dict(sorted(found.items()))


def _unique(found: Calibrated) -> list[list[Tensor]]:
    different = {id(packed): packed for packed in found.packed.values()}.values()
    return [[t for t in (p.codes, p.scales, p.zeros) if t is not None] for p in different]


class _Mixture(NamedTuple):
    """Forms of all modules for a budget, and the KL that they are estimated to cost."""

    budget: float
    forms: dict[str, Form]
    kl: float


def _mixtures(
    model: nn.Module,
    forms: Mapping[str, Form],
    inside: Sequence[str],
    experts: Mapping[str, Experts],
    budget_bits: float,
    ids: Tensor,
    seed: int,
    progress: bool,
) -> tuple[list[_Mixture], float]:
    """(Mixtures by sensitivity with more bits than ``forms``, smallest first, none of them twice; the KL that
    ``forms`` are estimated to cost, 0 where they are not among what is mixed).
    """
    base = forms[inside[0]]
    zeros = "point" if base.zeros == "none" and base.bits == 8 else base.zeros
    choices = _choices(Settings(sym=zeros == "none", scale_dtype=base.scales))
    units = sensitivities(model, some_of(ids, _HELD_OUT), list(inside), choices, seed=seed, progress=progress)
    stored, weights = _stored(model, {}, experts)
    used, _ = _stored(model, {name: forms[name] for name in inside}, experts)
    own = sum(unit.weights for unit in units)
    found: list[_Mixture] = []
    for budget in (*(bits for bits in BUDGETS if used / (own + weights) < bits < budget_bits), budget_bits):
        chosen = allocate(units, choices, (budget * (own + weights) - stored) / own)
        mixed = {**forms, **chosen}
        kl = sum(unit.kl[choices.index(chosen[unit.names[0]])] for unit in units)
        if mixed not in [forms, *(each.forms for each in found)]:
            found.append(_Mixture(budget, mixed, kl))
    known = all(forms[name] in choices for name in inside)
    return found, sum(unit.kl[choices.index(forms[unit.names[0]])] for unit in units) if known else 0.0


# ---- measuring ------------------------------------------------------------------------------------------------------


def _measure(given: Any, model: nn.Module, tokenizer: Any, length: int, seed: int) -> tuple[Measure, str]:
    """(function model -> number, what it measures)."""
    if callable(given) and not isinstance(given, nn.Module):
        return given, "the user's measure"
    if given is None:
        rows = self_generated(model, _HELD_OUT, length, seed + 1)
        ids, window, what = rows.flatten(), length, "perplexity of text the float model generated"
    elif isinstance(given, Tensor):
        ids, window, what = check_ids(given, model).flatten(), _WINDOW, "perplexity of the given tokens"
    elif isinstance(given, (str, Path)):
        is_file = isinstance(given, Path) or (len(given) < 4096 and Path(given).is_file())
        text = Path(given).read_text(encoding="utf-8") if is_file else str(given)
        ids, window, what = check_ids(text_ids(text, tokenizer), model), _WINDOW, "perplexity of the given text"
    else:
        raise TypeError(f"eval must be a function, a text, a path or token ids, got {type(given).__name__}")
    window = min(window, len(ids))
    if window < 4:
        raise ValueError(f"the evaluation text has {len(ids)} tokens, too few to measure anything")
    return lambda tried: evaluate(tried, ids, window=window).perplexity, f"{what}, windows of {window}"


def _number(value: Any, of: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"eval must return a finite number, got {value!r} for {of}")
    return float(value)


def _check_arguments(
    model: nn.Module, settings: Settings, target: float, budget_bits: float, methods: Sequence[Method]
) -> None:
    if not isinstance(settings, Settings):
        raise TypeError(f"config must be a CpuLlmConfig, got {type(settings).__name__}")
    settings.validate()
    check_model(model, settings)
    if hasattr(model, "_cpullm_settings"):
        raise ValueError("autotune needs the float model, and this one is optimised; load it anew")
    if any(member_of(module) is not None for module in model.modules()):
        raise ValueError("the model's layers are in groups: call cqil.restore(model), and cqil.apply() after autotune")
    if settings.bits != 4:
        raise ValueError(f"autotune looks for a 4-bit model; with bits={settings.bits} call optimize()")
    for name, value in (("target", target), ("budget_bits", budget_bits)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    if not methods or not all(isinstance(method, Method) for method in methods):
        raise ValueError(f"methods must be one or more of torch_cpullm.layerwise.Method, got {methods!r}")
    if not hasattr(model, "config") and all(method.epochs for method in methods):
        raise ValueError("distilled methods need a model of transformers, and there is no other method to try")
