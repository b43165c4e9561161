"""Experts of a mixture inside models: what is recognised, what stays in float and why, loading, saving, and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved_models import BY_NAME, logits, optimised
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import MergeModulelist

import torch_cpullm
from torch_cpullm import CpuLlmConfig, ops
from torch_cpullm.config import Settings
from torch_cpullm.experts import PackedExperts, read_experts
from torch_cpullm.swap import packed_modules

MIXTURES = [name for name, family in BY_NAME.items() if family.experts]
every_mixture = pytest.mark.parametrize("name", MIXTURES)


class Experts(nn.Module):
    """Experts as transformers has them; subclasses change one thing."""

    def __init__(self, experts: int = 4, hidden: int = 64, width: int = 32) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, hidden, generator=gen) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width, generator=gen) * 0.1)

    def act(self, gate: Tensor) -> Tensor:
        return nn.functional.silu(gate)

    def inner(self, x: Tensor, e: int) -> Tensor:
        gate, up = nn.functional.linear(x, self.gate_up_proj[e]).chunk(2, -1)
        return self.act(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(hidden_states)
        for t, s in torch.cartesian_prod(*map(torch.arange, top_k_index.shape)).tolist():
            e = int(top_k_index[t, s])
            y[t] += top_k_weights[t, s] * nn.functional.linear(self.inner(hidden_states[t], e), self.down_proj[e])
        return y


class Gelu(Experts):
    def act(self, gate: Tensor) -> Tensor:
        return nn.functional.gelu(gate, approximate="tanh")


class Tanh(Experts):
    def act(self, gate: Tensor) -> Tensor:
        return gate.tanh()


class Clamped(Experts):
    def act(self, gate: Tensor) -> Tensor:
        return nn.functional.silu(gate.clamp(max=7))


class Interleaved(Experts):
    def inner(self, x: Tensor, e: int) -> Tensor:
        both = nn.functional.linear(x, self.gate_up_proj[e])
        return self.act(both[..., ::2]) * both[..., 1::2]


class UpFirst(Experts):
    def inner(self, x: Tensor, e: int) -> Tensor:
        up, gate = nn.functional.linear(x, self.gate_up_proj[e]).chunk(2, -1)
        return self.act(gate) * up


class Biased(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 64))


class Transposed(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 48, 128))
        self.down_proj = nn.Parameter(torch.randn(4, 64, 48))


class OtherArguments(Experts):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x


class Mixture(nn.Module):
    """A block with a router and experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Module()
        self.gate.weight = nn.Parameter(torch.randn(4, 64))
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        scores, index = torch.softmax(x @ self.gate.weight.T, -1).topk(2, -1)
        return self.experts(x, index, scores)


# ---- what is recognised ---------------------------------------------------------------------------------------------


def test_structure_decides_and_not_the_class() -> None:
    for experts, act in ((Experts(), "silu"), (Gelu(), "gelu_tanh"), (Experts(experts=1), "silu")):
        assert read_experts(experts) == (act, "")
    model = Mixture(Gelu())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(x)
        got = torch_cpullm.optimize(model, Settings(bits=8, compute="fp32"), strict=True)(x)
    assert isinstance(model.experts, PackedExperts)
    assert "4 experts, hidden=64, intermediate=32, act=gelu_tanh, bits=8" in repr(model.experts)
    assert float((got - want).norm() / want.norm()) <= 0.02


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Tanh, "Tanh does not compute what gated experts do"),
        (Clamped, "Clamped does not compute what gated experts do"),
        (Interleaved, "Interleaved does not compute what gated experts do"),
        (UpFirst, "UpFirst does not compute what gated experts do"),
        (OtherArguments, "OtherArguments does not compute what gated experts do"),
        (Biased, "its experts have 'gate_up_proj_bias', which the operator for experts does not know"),
        (Transposed, r"its experts are stored transposed: \[4, 48, 128\] and \[4, 64, 48\]"),
    ],
)
def test_what_stays_in_float_is_said(kind: type[Experts], reason: str) -> None:
    model = Mixture(kind())
    with pytest.raises(ValueError, match=f"(?s)strict=True.*gate: not a linear layer.*experts.gate_up_proj: {reason}"):
        torch_cpullm.optimize(model, strict=True)
    assert isinstance(torch_cpullm.optimize(model).experts, kind)
    rows = {row.name: row for row in torch_cpullm.report(model).left_in_float}
    assert {"experts.gate_up_proj", "experts.down_proj", "gate"} <= set(rows)


def test_hooks_and_forwards_of_the_instance_are_kept() -> None:
    hooked, replaced, parametrised = Experts(), Experts(), Experts()
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda *_: None  # type: ignore[method-assign]
    torch.nn.utils.parametrize.register_parametrization(parametrised, "down_proj", nn.Identity())
    assert read_experts(hooked) == ("", "it has forward hooks")
    assert read_experts(replaced) == ("", "its forward was replaced on the instance")
    assert not isinstance(torch_cpullm.optimize(Mixture(parametrised)).experts, PackedExperts)


@pytest.mark.parametrize("excluded", ["experts", "gate_up_proj", r"model\.layers\.1\..*"])
def test_excluded_experts_stay_and_strict_agrees(excluded: str) -> None:
    model = BY_NAME["mixtral"].build()
    torch_cpullm.optimize(model, Settings(modules_to_not_convert=[excluded]), strict=True)
    assert not isinstance(model.model.layers[1].mlp.experts, PackedExperts)
    assert isinstance(model.model.layers[0].mlp.experts, PackedExperts) == excluded.startswith("model")
    assert torch_cpullm.report(model).left_in_float == []


def test_shapes_that_do_not_fit_are_refused() -> None:
    experts = optimised("mixtral").model.layers[0].mlp.experts
    with pytest.raises(ValueError, match=r"gate_up must be \[e, 2 i, h\] and down \[e, h, i\], got \[4, 80, 100\]"):
        PackedExperts(experts.down, experts.gate_up, act="silu", dtype=torch.float32)
    with pytest.raises(ValueError, match="act must be one of silu"):
        PackedExperts(experts.gate_up, experts.down, act="tanh", dtype=torch.float32)


# ---- running --------------------------------------------------------------------------------------------------------


def test_an_index_that_is_no_expert() -> None:
    experts = optimised("qwen2-moe").model.layers[0].mlp.experts
    x = torch.randn(2, 80)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"index\[1, 0\] = 6 is outside \[0, 6\)"):
        experts(x, torch.tensor([[0], [6]]), torch.ones(2, 1))


def test_no_gradients_and_no_other_device() -> None:
    model = copy.deepcopy(optimised("qwen2-moe"))
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(2, 80, requires_grad=True)
    with pytest.raises(RuntimeError, match="for inference"):
        experts(x, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    with pytest.raises(RuntimeError, match="stays on the CPU"):
        experts.to("meta")
    assert experts.to(torch.bfloat16).dtype == torch.bfloat16
    names = [name for name, module in packed_modules(model) if isinstance(module, PackedExperts)]
    assert names == [f"model.layers.{i}.mlp.experts" for i in range(2)]


@every_mixture
def test_generate_on_every_level(name: str, isa: str) -> None:
    model = optimised(name)
    ids = torch.arange(3, 12).view(1, 9)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert out.shape == (1, 15)
    with ops.use_isa("ref"), torch.no_grad():
        want = model(ids).logits
    with torch.no_grad():
        got = model(ids).logits
    assert float((got - want).norm() / want.norm()) <= 0.05


@every_mixture
def test_compiled(name: str) -> None:
    model = copy.deepcopy(optimised(name))
    want = logits(model)
    model.compile(backend="aot_eager")
    assert torch.allclose(logits(model), want, rtol=1e-3, atol=1e-3)


# ---- loading and saving ---------------------------------------------------------------------------------------------


@every_mixture
def test_quantised_while_loading_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    """Bit for bit: optimize() of the loaded model, the quantising load, its reload, and both restored."""
    BY_NAME[name].build().save_pretrained(tmp_path / "float")
    want = torch_cpullm.optimize(AutoModelForCausalLM.from_pretrained(tmp_path / "float"))
    config = CpuLlmConfig(strict=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    loaded.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for model in (loaded, again):
        assert str(torch_cpullm.report(model)) == str(torch_cpullm.report(want))
        assert torch.equal(logits(model), logits(want))
        assert same(model.state_dict(), want.state_dict())
    kinds = {type(module) for module in AutoModelForCausalLM.from_pretrained(tmp_path / "float").modules()}
    torch_cpullm.restore(want)
    for model in (loaded, again):
        restored = torch_cpullm.restore(model)
        assert {type(module) for module in restored.modules()} == kinds
        assert same(restored.state_dict(), want.state_dict())
        restored.save_pretrained(tmp_path / "restored")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "restored")), logits(want))


@every_mixture
def test_experts_are_never_joined_in_float(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint has a tensor for each expert's matrix; excluded experts are joined as ever."""
    BY_NAME[name].build().save_pretrained(tmp_path)
    assert any("experts.0." in key for key in load_file(tmp_path / "model.safetensors"))
    want = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = CpuLlmConfig(modules_to_not_convert=["experts"])
    excluded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    experts = "model.layers.1.mlp.experts"
    assert same(excluded.get_submodule(experts).state_dict(), want.get_submodule(experts).state_dict())

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("joined in float")

    monkeypatch.setattr(MergeModulelist, "convert", refuse)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CpuLlmConfig())
    assert isinstance(model.get_submodule(experts), PackedExperts)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def test_state_dict_round_trip() -> None:
    model, other = copy.deepcopy(optimised("mixtral")), BY_NAME["mixtral"].build(seed=7)
    torch_cpullm.optimize(other)
    state = model.state_dict()
    experts = "model.layers.1.mlp.experts."
    assert list(state[experts + "gate_up_proj_codes"].shape) == [4, 200, 40]
    assert list(state[experts + "down_proj_scales"].shape) == [4, 80, 4]
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))
    broken: dict[str, Any] = {**state, experts + "down_proj_codes": state[experts + "down_proj_codes"][:3]}
    with pytest.raises(RuntimeError, match=r"experts\.down_proj: codes, scales and zeros must be 4 matrices each"):
        other.load_state_dict(broken)
    del broken[experts + "down_proj_codes"]
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.down_proj_codes"):
        other.load_state_dict(broken)


def test_values_that_have_no_packed_form_are_refused_whole(tmp_path: Path) -> None:
    model = BY_NAME["mixtral"].build()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"the weight of model\.layers\.1\.mlp\.experts holds NaN or inf"):
        torch_cpullm.optimize(model)
    assert not list(packed_modules(model))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the weight of model\.layers\.1\.mlp\.experts holds NaN or inf"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CpuLlmConfig())


def test_a_checkpoint_whose_experts_do_not_fit(tmp_path: Path) -> None:
    """They are narrower than the config says."""
    family = BY_NAME["qwen2-moe"]
    family.build().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"moe_intermediate_size": 36', '"moe_intermediate_size": 40'))
    with pytest.raises(ValueError, match=r"experts\.(gate_up|down)_proj is \[6, .*and must be \[6, "):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CpuLlmConfig())


def test_experts_of_a_checkpoint_that_transformers_changed(tmp_path: Path) -> None:
    """An unknown activation instead of the one that was saved is an error, not another result."""
    optimised("mixtral").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden_act": "silu"', '"hidden_act": "tanh"'))
    with pytest.raises(ValueError, match=r"packed experts for model\.layers\.0\.mlp\.experts, but here MixtralExperts"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
