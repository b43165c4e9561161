"""LoRA repair of a grouped model by self-distillation: the model as it was teaches the model with its groups.

``loss = KL(teacher || student)``, where the teacher is the same weights without groups and without adapters. Before
quantising; the adapters are merged into the weights, so that nothing of them is left in the model. Needs PEFT
(``pip install peft``, or the extra ``[repair]``).

Source: CQIL (Zou et al., ACL 2024): LoRA of rank 32 on all linears of all layers, KL at temperature 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .cqil import saved_plan, ungrouped
from .layer_match import decoders
from .linear import PackedLinear


def repair(
    model: nn.Module,
    tokens: Tensor,
    *,
    steps: int = 100,
    rank: int = 32,
    learning_rate: float = 5e-4,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train what the groups of ``model`` cost out of its linears, in place; returns ``model`` with merged weights.

    tokens: int64 [n, s], training text; step i takes row i modulo n. A model in float32, with a plan applied.
    progress: called with the step and its loss in nats per token. Only the weights of the decoder's nn.Linear change;
    :func:`cqil.restore` afterwards takes the groups apart and keeps the new weights.

    Raises ValueError: no plan on the model, packed weights, tokens of another form; ImportError without PEFT.
    """
    if saved_plan(model) is None:
        raise ValueError("the model has no groups to repair: call cqil.apply(model, plan) first")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("packed weights cannot be trained: repair the float model, then optimize() it")
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 2 or 0 in tokens.shape:
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be int64 [n, s] with n, s >= 1, got {got}")
    if steps < 1 or rank < 1 or not learning_rate > 0:
        raise ValueError(f"steps, rank and learning_rate must be positive, got {steps}, {rank} and {learning_rate}")
    from peft import LoraConfig, get_peft_model

    decoder = next(decoders(model))
    names = [name for name, module in decoder.layers.named_modules() if isinstance(module, nn.Linear)]
    targets = [f"{decoder.name}.{name}" for name in names]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    modes = [module for module in model.modules() if module.training]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks transformers by a name that it is about to drop: no business of our caller's.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        torch.manual_seed(seed)
        student: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    student.eval()  # no dropout; gradients flow all the same
    try:
        _distil(student, model, tokens, steps, learning_rate, progress)
    finally:
        student.merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        for module in modes:
            module.training = True
        vars(model).pop("peft_config", None)
    return model


def _distil(
    student: Any,
    model: nn.Module,
    tokens: Tensor,
    steps: int,
    learning_rate: float,
    progress: Callable[[int, float], None] | None,
) -> None:
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.1)
    for step in range(steps):
        ids = tokens[step % len(tokens)][None]
        with torch.no_grad(), ungrouped(model), student.disable_adapter():
            teacher = student(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        with torch.enable_grad():
            logits = student(input_ids=ids, use_cache=False).logits[0].float()
            loss = nn.functional.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if progress is not None:
            progress(step, float(loss.detach()))
