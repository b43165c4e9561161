"""Bad input to optimize: an error that names the argument or the module, and nothing half-changed."""

import os
import re
import subprocess
import sys
import types

import pytest
import torch
from cases import FLOATS
from small_models import IDS, Tiny, assert_unchanged, refuses, state_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_cpullm
from torch_cpullm.config import Settings

# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("bits", 3, "bits must be 4 or 8, got 3"),
        ("bits", "4", "bits must be 4 or 8, got '4'"),
        ("bits", 4.0, "bits must be 4 or 8, got 4.0"),
        ("bits", True, "bits must be 4 or 8, got True"),
        ("group_size", 0, "group_size must be -1 .*, got 0"),
        ("group_size", 100, "group_size must be -1 .* multiple of 32, got 100"),
        ("group_size", None, "group_size must be an integer, got None"),
        ("sym", 1, "sym must be True or False, got 1"),
        ("compute", "int4", "compute must be 'int8', 'bf16' or 'fp32', got 'int4'"),
        ("compute", None, "compute must be .*, got None"),
        ("head_bits", 5, "head_bits must be 4, 8 or None, got 5"),
        ("head_bits", 8.0, "head_bits must be 4, 8 or None, got 8.0"),
        ("head_bits", False, "head_bits must be 4, 8 or None, got False"),
        ("scale_dtype", "float32", "scale_dtype must be one of float16, bfloat16, got 'float32'"),
        ("scale_dtype", torch.float16, "scale_dtype must be one of float16, bfloat16"),
        ("kv_cache", "int4", "kv_cache must be one of auto, fp32, bf16, fp16, int8, got 'int4'"),
        ("kv_cache", torch.int8, "kv_cache must be one of .*, got torch.int8"),
        ("kv_cache", None, "kv_cache must be one of .*, got None"),
        ("modules_to_not_convert", "lm_head", "modules_to_not_convert must be a list of strings, got 'lm_head'"),
        ("modules_to_not_convert", [1], r"modules_to_not_convert must be a list of strings, got \[1\]"),
        ("modules_to_not_convert", 5, "modules_to_not_convert must be a list of strings, got 5"),
    ],
)
def test_settings_are_checked_when_made_and_when_used(field, value, text):
    for config in (Settings, torch_cpullm.CpuLlmConfig):
        with pytest.raises(ValueError, match=text):
            config(**{field: value})
        changed = config()
        setattr(changed, field, value)
        refuses(Tiny(), ValueError, text, changed)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "gpt2", {"weight": torch.ones(2)}, torch.ones(2, 2), nn.Linear])
def test_no_module(model):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got \w+"):
        torch_cpullm.optimize(model)


@pytest.mark.parametrize("config", [4, "int4", {"bits": 4}, Settings])
def test_no_config(config):
    refuses(Tiny(), TypeError, r"config must be a CpuLlmConfig, got \w+", config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["embed", "blocks.0.up", "blocks.1.down", "head"])
def test_nan_and_inf_weights_are_named(name, dtype, value):
    model = Tiny(False, dtype)
    with torch.no_grad():
        model.get_submodule(name).weight[3, 5] = value
    refuses(model, ValueError, f"weight of {re.escape(name)} holds NaN or inf")


def test_nan_in_a_module_that_stays_is_not_our_business():
    model = Tiny(False)
    with torch.no_grad():
        model.head.weight[3, 5] = float("nan")
    torch_cpullm.optimize(model, Settings(modules_to_not_convert=["head"]))


def test_weights_too_large_for_their_scales():
    for value in (1e5, -1e6, 1e30):
        model = Tiny(False)
        with torch.no_grad():
            model.blocks[1]["up"].weight[95, 63] = value
        refuses(model, ValueError, r"weight of blocks\.1\.up .*65504.*too large")


def test_huge_group_size_is_refused_or_works():
    for group in (2**40, 2**62, 2**63 - 32):
        model = Tiny(False)
        before = state_of(model)
        try:
            torch_cpullm.optimize(model, Settings(group_size=group))
        except ValueError as error:
            assert "group_size" in str(error)  # noqa: PT017
            assert_unchanged(model, before)
        else:
            assert bool(torch.isfinite(model(IDS)).all())


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_model_on_meta(what):
    model = Tiny(False)
    if what == "parameter":
        model.blocks[1]["down"].to("meta")
        name = r"blocks\.1\.down\.weight"
    else:
        model.blocks[0]["norm"].register_buffer("table", torch.empty(4, device="meta"))
        name = r"blocks\.0\.norm\.table"
    refuses(model, ValueError, f"{name} is on the meta device")


def test_model_on_another_device():
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(50, 64, device="cuda"))
    model = Tiny(False)
    model.head.weight = weight
    refuses(model, ValueError, r"head\.weight is on cuda:0; call model.cpu\(\) first")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_model_quantised_by_another_method(method):
    for config in ({"quant_method": method}, types.SimpleNamespace(quant_method=method)):
        model = Tiny()
        model.config = types.SimpleNamespace(quantization_config=config)
        refuses(model, ValueError, f"already quantised by '{method}'")


def test_strict_names_what_would_stay():
    class Experts(Tiny):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 64, 64))

    refuses(Experts(), ValueError, "(?s)strict=True.*would stay in float.*experts: 3-D parameter", strict=True)
    model = torch_cpullm.optimize(Experts())
    before = str(torch_cpullm.report(model))
    refuses(model, ValueError, "(?s)strict=True.*experts", strict=True)
    assert str(torch_cpullm.report(model)) == before
    assert torch_cpullm.optimize(Tiny(), strict=True)


def test_strict_names_the_reason_given_by_the_first_call():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(64, 64), Scaled(64, 64))
    before = str(torch_cpullm.report(torch_cpullm.optimize(model)))
    assert "Scaled" in before
    refuses(model, ValueError, "(?s)strict=True.*1: Scaled", strict=True)
    assert str(torch_cpullm.report(model)) == before


UNREACHABLE = """
import torch_cpullm, torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
try:
    torch_cpullm.optimize(model)
except RuntimeError as error:
    print(error)
print(type(model[0]).__name__, model.training, sorted(vars(model)) == sorted(vars(torch.nn.Sequential())))
"""


def test_unreachable_isa_is_an_error_of_optimize_not_of_import():
    """The variable is read once per process."""
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE],
        env={**os.environ, "CPULLM_ISA": "avx9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert "CPULLM_ISA: 'avx9' is not a known level; reachable here: ref" in first
    assert second == "Linear True True"
