"""optimize() is right on every family: against the same model with the same dequantised weights, INT8 head included."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, Family
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import torch_cpullm
from torch_cpullm.config import Settings
from torch_cpullm.linear import PackedEmbedding, PackedLinear, PackedModule
from torch_cpullm.packing import PackedStack, PackedWeight, dequantize

PROMPT, STEPS = 9, 16
TOLERANCE = 1e-4  # of the largest logit of a step; 1e-3 is what the package promises
BY_NAME = {family.name: family for family in FAMILIES}
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    """These matrices are too small to share; on a busy machine two threads would only wait for each other."""
    torch.set_num_threads(1)


@dataclass
class Case:
    """exact: optimised, compute fp32. reference: float, with the weights that `exact` computes with."""

    exact: Any
    reference: Any
    prompt: Tensor
    tokens: Tensor  # prompt and what the reference says next, one token more than is fed back


@cache
def case(family: Family) -> Case:
    exact = torch_cpullm.optimize(family.build(), Settings(compute="fp32"), strict=True)
    reference = with_weights_of(exact, family.build())
    for seed in range(1, 9):
        prompt = torch.randint(2, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(seed))
        tokens, logits = greedy(reference, prompt)
        if bool(decided(logits).all()) and len(set(tokens[0, PROMPT:].tolist())) >= 4:
            return Case(exact, reference, prompt, tokens)
    raise AssertionError(f"{family}: whatever the prompt, some token could as well be another, or all are the same")


def decided(logits: Tensor) -> Tensor:
    """Whether the tolerance cannot change the largest logit of a step: the margin to the second is beyond twice it."""
    top = logits.topk(2, -1).values
    return top[:, 0] - top[:, 1] > 2 * TOLERANCE * logits.abs().amax(-1)


def with_weights_of(optimised: nn.Module, model: Any) -> Any:
    """`model` with the dequantised weights of `optimised`, found without restore()."""
    with torch.no_grad():
        for name, packed in optimised.named_modules():
            module = model.get_submodule(name) if isinstance(packed, PackedModule) else None
            for key, weight in packed.weights().items() if module is not None else ():
                value = dequantized(weight)
                getattr(module, key).copy_(value.T if isinstance(module, Conv1D) else value)
    return model


def dequantized(weight: PackedWeight | PackedStack) -> Tensor:
    if isinstance(weight, PackedStack):
        return torch.stack([dequantize(weight[i]) for i in range(weight.count)])
    return dequantize(weight)


def greedy(model: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """(ids [1, prompt + new], logits [new, vocabulary]) of generate()."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=STEPS + 1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.cat(out.logits).float()


def teacher_forced(model: Any, tokens: Tensor) -> Tensor:
    """Logits [PROMPT + STEPS, vocabulary] of the prefill's positions and of one decode step after another."""
    with torch.inference_mode():
        out = model(tokens[:, :PROMPT], use_cache=True)
        logits = [out.logits[0]]
        for step in range(PROMPT, PROMPT + STEPS):
            out = model(tokens[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
    return torch.cat(logits).float()


def relative_errors(got: Tensor, want: Tensor) -> Tensor:
    """Largest error of each step, as a part of that step's largest logit."""
    return (got - want).abs().amax(-1) / want.abs().amax(-1)


def divergence(want: Tensor, got: Tensor) -> Tensor:
    """KL(want || got) in nats of each step, from logits."""
    p = want.double().log_softmax(-1)
    return (p.exp() * (p - got.double().log_softmax(-1))).sum(-1)


# ---- compute fp32: the reference's logits and tokens ----------------------------------------------------------------


@every_family
def test_logits_of_fp32_compute(family):
    c = case(family)
    want, got = teacher_forced(c.reference, c.tokens), teacher_forced(c.exact, c.tokens)
    assert want.std() > 1, "flat logits would prove nothing"
    errors = relative_errors(got, want)
    assert errors.shape == (PROMPT + STEPS,)
    assert float(errors.max()) <= TOLERANCE
    sure = decided(want)
    assert int(sure.sum()) >= PROMPT + STEPS - 3
    assert torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])


@every_family
def test_tokens_of_fp32_compute(family):
    c = case(family)
    assert greedy(c.exact, c.prompt)[0].tolist() == c.tokens.tolist()


@every_family
def test_packed_weights_are_near_the_float_ones(family):
    """The reference is made of what was packed, so it would not show a matrix in the wrong place or transposed."""
    original = family.build()
    for name, module in case(family).exact.named_modules():
        if not isinstance(module, PackedModule):
            continue
        before = original.get_submodule(name)
        for key, packed in module.weights().items():
            value = getattr(before, key).detach()
            want = value.T if isinstance(before, Conv1D) else value
            error = (dequantized(packed) - want).norm() / want.norm()
            bits = packed.whole.bits if isinstance(packed, PackedStack) else packed.bits
            assert float(error) <= (0.1 if bits == 4 else 0.006), name
        if isinstance(module, PackedLinear) and before.bias is not None:
            assert torch.equal(module.bias, before.bias), name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_kernel_level_and_two_threads(name, isa):
    torch.set_num_threads(2)
    c = case(BY_NAME[name])
    want = teacher_forced(c.reference, c.tokens)
    assert float(relative_errors(teacher_forced(c.exact, c.tokens), want).max()) <= TOLERANCE
    got = teacher_forced(torch_cpullm.optimize(BY_NAME[name].build()), c.tokens)
    assert float(divergence(want, got).mean()) <= 0.01


# ---- compute int8: near it ------------------------------------------------------------------------------------------


@every_family
def test_int8_compute(family):
    c = case(family)
    model = torch_cpullm.optimize(family.build())
    want, got = teacher_forced(c.reference, c.tokens), teacher_forced(model, c.tokens)
    assert bool(torch.isfinite(got).all())
    near = torch.cosine_similarity(got, want, -1) >= 0.995
    if family.experts:
        # Where two experts are all but equally good, the other one may be taken: a jump, in few steps.
        assert float(near.float().mean()) >= 0.8
    else:
        assert bool(near.all())
    assert float(divergence(want, got)[near].mean()) <= 0.01
    assert greedy(model, c.prompt)[0].shape == c.tokens.shape


@every_family
def test_rows_do_not_depend_on_the_batch(family):
    """Activations are quantised row by row: what else stands in the batch is no matter. Attention and norms, which are
    torch's, may round differently.
    """
    model = torch_cpullm.optimize(family.build())
    ids = torch.randint(2, VOCAB, (3, PROMPT), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        together = model(ids).logits
        for row in range(3):
            alone = model(ids[row : row + 1]).logits[0]
            assert float(relative_errors(together[row], alone).max()) <= 0.01


# ---- what was swapped -----------------------------------------------------------------------------------------------


@every_family
def test_report(family):
    model = case(family).exact
    original = family.build()
    report = torch_cpullm.report(model)
    rows = {row.name: row for row in report.rows}
    head, embedding = original.get_output_embeddings(), original.get_input_embeddings()
    for name, module in original.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) or module is embedding:
            assert rows[name].state == ("int8" if module is head or module is embedding else "int4"), name
            assert rows[name].kind == ("embedding" if module is embedding else "linear")
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            for key in ("gate_up_proj", "down_proj"):
                row = rows[f"{name}.{key}"]
                assert (row.kind, row.state, row.bytes_before) == ("experts", "int4", getattr(module, key).nbytes)
    assert report.left_in_float == []
    # Nothing was forgotten: what is a matrix still is in the report, as a lookup table or with a reason.
    floats = {name.removesuffix(".weight") for name, tensor in model.named_parameters() if tensor.dim() > 1}
    assert floats == {row.name for row in report.rows if row.state == "float"}
    assert all(row.reason for row in report.rows if row.state == "float")
    routers = {name for name in floats if "router" in rows[name].reason}
    assert len(routers) == sum(name.endswith("mlp.gate") for name, _ in original.named_modules())
    assert bool(routers) == family.experts
    for name in floats - routers:
        assert isinstance(model.get_submodule(name), nn.Embedding)
    assert str(report).count("\n") >= 3


@every_family
def test_tied_embeddings_share_one_copy(family):
    model = case(family).exact
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, PackedLinear)
    assert isinstance(embedding, PackedEmbedding)
    assert (head.packed is embedding.packed) == family.tied
    rows = torch_cpullm.report(model).rows
    assert sum("shares its packed weight" in row.reason for row in rows) == family.tied


@every_family
def test_second_call_changes_nothing(family):
    model = copy.deepcopy(case(family).exact)
    modules = dict(model.named_modules())
    assert torch_cpullm.optimize(model, Settings(compute="fp32")) is model
    assert all(module is modules[name] for name, module in model.named_modules())


# ---- and back -------------------------------------------------------------------------------------------------------


@every_family
def test_restore(family):
    c = case(family)
    original = family.build()
    model = torch_cpullm.restore(copy.deepcopy(c.exact))
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in original.named_modules()
    }
    want, got = c.reference.state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == family.tied
    errors = relative_errors(teacher_forced(model, c.tokens), teacher_forced(c.exact, c.tokens))
    assert float(errors.max()) <= TOLERANCE
    # The optimised model that the copy was made of is still one.
    assert isinstance(c.exact.get_output_embeddings(), PackedLinear)
    # A restored model can be optimised again.
    assert torch_cpullm.optimize(model, strict=True) is model
    assert isinstance(model.get_output_embeddings(), PackedLinear)


# ---- 16-bit models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("gemma3", torch.bfloat16),
        ("gpt2", torch.bfloat16),
        ("falcon-gqa", torch.bfloat16),
        ("llama", torch.float16),
    ],
)
def test_16_bit_models(name, dtype):
    """In bf16 the reference itself rounds; the optimised model is no further from exact arithmetic than that."""
    family = BY_NAME[name]
    model = torch_cpullm.optimize(family.build(dtype), Settings(compute="fp32"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    exact = with_weights_of(model, family.build(dtype).float())
    plain = with_weights_of(model, family.build(dtype))
    tokens = case(family).tokens
    want = teacher_forced(exact, tokens)
    error, usual = (relative_errors(teacher_forced(m, tokens), want).mean() for m in (model, plain))
    assert float(error) <= 1.2 * float(usual)
    assert float(error) <= 0.05
    got = teacher_forced(torch_cpullm.optimize(family.build(dtype)), tokens)
    assert float(divergence(want, got).mean()) <= 0.02
    assert greedy(model, tokens[:, :PROMPT])[0].shape == tokens.shape
    restored = torch_cpullm.restore(model)
    assert {parameter.dtype for parameter in restored.parameters()} == {dtype}
    assert float(relative_errors(teacher_forced(restored, tokens), want).mean()) <= 1.2 * float(usual)
