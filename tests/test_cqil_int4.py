"""CQIL on optimised models: groups as operators, in whole decode steps, saved and loaded, and what falls back."""

import copy
import pickle

import pytest
import torch
from fresh import install_into, run
from layer_models import ALL, WHY_NOT, runs
from test_cqil import IDS, NO_SPLIT, SPLIT, grouped, llama, logits
from transformers import AutoModelForCausalLM, DynamicCache

import torch_cpullm
from torch_cpullm import cli, cqil, layer_program
from torch_cpullm.kv_cache import CpuLlmCache
from torch_cpullm.layer import GROUP_OP, IN_TORCH, ONE_OP, PER_LINEAR, layer_levels, remove_programs
from torch_cpullm.linear import PackedLinear

PAIRS = [(1, 2), (3, 2)]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def optimised(model=None, **settings):
    return torch_cpullm.optimize(model or llama(), torch_cpullm.CpuLlmConfig(**settings))


def levels(model):
    return [level for _, level, _ in layer_levels(model)]


def close(got, want, bound=1e-3):
    assert float((got - want).abs().max()) <= bound * float(want.abs().max())


@pytest.fixture
def counts(monkeypatch):
    """Calls of the operators: groups, steps."""
    found = {"groups": 0, "steps": 0}

    def counting(key, real):
        def call(*args):
            found[key] += 1
            return real(*args)

        return call

    monkeypatch.setattr(layer_program, "run_all", counting("groups", layer_program.run_all))
    monkeypatch.setattr(layer_program.Stack, "__call__", counting("steps", layer_program.Stack.__call__))
    return found


@pytest.mark.parametrize("name", sorted(set(SPLIT) - set(WHY_NOT)))
def test_families_run_as_one_operator_per_group(name, counts):
    """And compute what the same packed linears do in plain torch: prompt, tokens, chunk, left padding."""
    model = optimised(grouped(ALL[name].build(), [(0, 2)]), compute="fp32")
    count = model.config.num_hidden_layers
    assert levels(model) == [GROUP_OP, GROUP_OP, *[ONE_OP] * (count - 2)]
    want = runs(model, DynamicCache)  # a cache that programs do not write
    assert counts == {"groups": 0, "steps": 0}
    got = runs(model, lambda: CpuLlmCache(model.config))
    assert counts["groups"] + counts["steps"] == 10
    for mine, its in zip(got, want, strict=True):
        close(mine, its)


@pytest.mark.parametrize(("mode", "bypass"), [("cqil", 0), ("cqil", 1), ("lp", 0)])
@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
def test_generate_by_steps_groups_and_linears(mode, bypass, kv_cache, counts):
    """Whole steps have the bits of group by group; a forward without cache says the same tokens."""
    model = optimised(compute="fp32", kv_cache=kv_cache)
    plain = model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    grouped(model, PAIRS, mode, bypass)
    assert levels(model) == [ONE_OP, *[GROUP_OP] * 4, ONE_OP]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    counts["steps"] = 0
    del model.__dict__["forward"]  # its last norm adds in another order, see test_layer_token.py
    steps = model.generate(IDS, **settings, output_logits=True, return_dict_in_generate=True)
    assert counts["steps"] == 6
    for layer in model.model.layers:
        layer.forward._stack = None
    apart = model.generate(IDS, **settings, output_logits=True, return_dict_in_generate=True)
    assert all(map(torch.equal, steps.logits, apart.logits))
    assert not torch.equal(plain, steps.sequences)
    if kv_cache == "auto":
        assert torch.equal(steps.sequences, model.generate(IDS, **settings, use_cache=False))
    cqil.restore(model)
    assert levels(model) == [ONE_OP] * 6
    assert torch.equal(model.generate(IDS, **settings), plain)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}], ids=str)
def test_generation_modes(kwargs):
    model = grouped(optimised(compute="fp32"), PAIRS, "cqil", 1)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **kwargs}
    torch.manual_seed(0)
    got = model.generate(IDS[:1], **settings)
    torch.manual_seed(0)
    settings["prompt_lookup_num_tokens"] = None
    assert torch.equal(got, model.generate(IDS[:1], **settings, use_cache=False))


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize(("mode", "bypass"), [("cqil", 1), ("lp", 0)])
def test_generation_modes_with_an_int8_cache(kwargs, mode, bypass):
    """The tokens of the groups' operators are those of the same groups in plain torch, on the same cache."""
    model = grouped(optimised(compute="fp32", kv_cache="int8"), PAIRS, mode, bypass)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **kwargs}
    got = model.generate(IDS[:1], **settings, return_dict_in_generate=True)
    assert got.past_key_values.layers[1].k.dtype == torch.int8
    remove_programs(model)
    assert torch.equal(got.sequences, model.generate(IDS[:1], **settings))


def test_before_and_after_optimize_is_the_same():
    first = optimised(grouped(llama(), PAIRS, "lp"))
    second = grouped(optimised(), PAIRS, "lp")
    assert torch.equal(logits(first), logits(second))
    want = logits(cqil.restore(second))
    assert torch.equal(want, logits(optimised()))
    assert torch.equal(logits(cqil.restore(first)), want)


def test_restoring_the_weights_keeps_the_groups():
    model = torch_cpullm.restore(optimised(grouped(llama(), PAIRS), compute="fp32"))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert levels(model) == [IN_TORCH] * 4
    assert [name for name, _, _ in layer_levels(model)] == [f"model.layers.{i}" for i in range(1, 5)]
    close(logits(model), logits(grouped(optimised(compute="fp32"), PAIRS)))


@pytest.mark.parametrize("fold", [False, True])
def test_groups_of_one_in_int4(fold):
    """The bits of the layers; folding norms into the float weights first changes these within rounding."""
    model = llama()
    plan = cqil.Plan.of(model, [(i, 1) for i in range(6)])
    exact = logits(model)
    if fold:
        assert cqil.fold_norms(model, plan) == 6
    close(logits(model), exact, 1e-5)
    want = logits(optimised(model))
    assert torch.equal(logits(cqil.apply(model, plan)), want)
    assert levels(model) == [GROUP_OP] * 6


def test_folded_norms(counts):
    model = llama()
    plan = cqil.Plan.of(model, PAIRS)
    assert cqil.fold_norms(cqil.apply(model, plan), plan) == 4
    model = optimised(model, compute="fp32")
    assert counts["groups"] == 0
    got = logits(model)
    assert counts["groups"] == 2
    close(got, logits(model, past_key_values=DynamicCache()))
    assert counts["groups"] == 2


# ---- fallbacks ------------------------------------------------------------------------------------------------------


def test_the_report_says_how_groups_run():
    model = grouped(optimised(), PAIRS)
    assert "4 of 6 as one op per group" in str(torch_cpullm.report(model))
    model.model.layers[2].mlp.up_proj.compute = "fp32"
    reasons = {name: reason for name, _, reason in layer_levels(model)}
    assert "compute" in reasons["model.layers.2"]
    assert "another layer of its group" in reasons["model.layers.1"]
    assert levels(model) == [ONE_OP, PER_LINEAR, PER_LINEAR, GROUP_OP, GROUP_OP, ONE_OP]
    close(logits(model), logits(grouped(optimised(), PAIRS)), 0.1)
    skipping = cqil.apply(optimised(), cqil.baseline(llama(), "skip", 2))
    assert levels(skipping).count(PER_LINEAR) == 2
    assert "a CQIL plan skips it" in str(torch_cpullm.report(skipping))


def test_layers_that_compute_in_different_ways():
    model = optimised(compute="fp32")
    for module in model.model.layers[2].modules():
        if isinstance(module, PackedLinear):
            module.compute = "int8"
    grouped(model, PAIRS)
    reasons = [reason for _, _, reason in layer_levels(model)]
    assert reasons == ["", *["the layers of its group compute in different ways"] * 2, "", "", ""]
    close(logits(model), logits(grouped(optimised(compute="fp32"), PAIRS)), 0.1)


def test_large_groups_have_no_operator(counts):
    model = grouped(optimised(llama(11), compute="fp32"), [(1, 9)])
    assert levels(model) == [ONE_OP, *[PER_LINEAR] * 9, ONE_OP]
    assert logits(model).isfinite().all()
    assert counts == {"groups": 0, "steps": 0}


@pytest.mark.parametrize("name", sorted((set(WHY_NOT) & set(SPLIT)) - set(NO_SPLIT)))
def test_families_without_programs_are_grouped_too(name):
    model = grouped(optimised(ALL[name].build(), compute="fp32"), [(0, 2)])
    assert PER_LINEAR in levels(model)
    tokens = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False))


def test_hidden_states_hooks_and_interference(counts):
    model = grouped(optimised(compute="fp32"), PAIRS)
    states = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == 7
    assert torch.equal(states[1], states[2])
    seen = []
    model.model.layers[2].self_attn.register_forward_hook(lambda module, args, y: seen.append(y[0].shape))
    before = counts["groups"]
    logits(model)
    assert len(seen) == 1, "a hook inside: its group runs in plain torch"
    assert counts["groups"] == before + 1
    model.model.layers[1].register_forward_hook(lambda module, args, y: y + 1)
    with pytest.raises(RuntimeError, match="must get what the layer before returned"):
        logits(model)


# ---- copies, files, graphs ------------------------------------------------------------------------------------------


def test_copies():
    model = grouped(optimised(), PAIRS, "cqil", 1)
    want = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
        assert levels(other) == levels(model)
        cqil.restore(other)
        assert levels(other) == [ONE_OP] * 6
    assert torch.equal(logits(model), want)


def test_save_and_load_without_an_import(tmp_path):
    model = grouped(optimised(), PAIRS, "cqil", 1)
    model.save_pretrained(tmp_path)
    want = logits(model)
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad():\n    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])\n"
    )
    ids, out = tmp_path / "ids.pt", tmp_path / "logits.pt"
    torch.save(IDS, ids)
    run(script, install_into(tmp_path / "installed"), tmp_path, ids, out)
    assert torch.equal(torch.load(out), want)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert cqil.saved_plan(loaded) == cqil.saved_plan(model)
    assert levels(loaded) == levels(model)
    assert not torch.equal(logits(cqil.restore(loaded)), want)


def test_a_float_checkpoint_quantised_while_it_loads(tmp_path):
    model = grouped(llama(), PAIRS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=torch_cpullm.CpuLlmConfig())
    assert torch.equal(logits(loaded), logits(optimised(model)))
    assert GROUP_OP in levels(loaded)


def test_quantize_keeps_the_plan(tmp_path, capsys):
    """`cpullm quantize` of a float checkpoint: what is loaded from its result computes the groups."""
    model = grouped(llama(), PAIRS, "lp")
    model.save_pretrained(tmp_path / "float")
    assert cli.main(["quantize", str(tmp_path / "float"), str(tmp_path / "int4")]) == 0
    assert "weights as" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
    assert cqil.saved_plan(loaded) == cqil.saved_plan(model)
    assert levels(loaded) == [ONE_OP, *[GROUP_OP] * 4, ONE_OP]
    assert torch.equal(logits(loaded), logits(optimised(model)))


def test_a_damaged_plan_in_a_checkpoint_is_an_error(tmp_path):
    model = grouped(optimised(), PAIRS)
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    assert '"architecture": "llama"' in text
    config.write_text(text.replace('"architecture": "llama"', '"architecture": "qwen2"'))
    with pytest.raises(ValueError, match="architecture is 'qwen2' there and 'llama' here"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("level", ["float", "backend", "optimised"])
def test_compiled(level):
    """A compiled model computes its groups: traced, as the backend's linears, or as opaque operators."""
    model = grouped(llama(), PAIRS, "cqil", 1)
    if level == "optimised":
        optimised(model, compute="fp32")
    want = logits(model)
    modes = ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}) if level == "optimised" else ()
    settings = [{"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **mode} for mode in modes]
    tokens = [model.generate(IDS[:1], **each) for each in settings]
    options = {"backend": "cpullm", "options": {"compute": "fp32", "bits": 8}} if level == "backend" else {}
    model.compile(**(options or {"backend": "eager"}), fullgraph=level != "optimised")
    close(logits(model), want, 0.1 if level == "backend" else 1e-3)
    for each, its in zip(settings, tokens, strict=True):
        assert torch.equal(model.generate(IDS[:1], **each), its)
    torch._dynamo.reset()
