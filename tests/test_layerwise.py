"""Calibration layer by layer: folds change nothing, the model stays as it is, runs resume, results save and reload."""

import copy
import shutil

import pytest
import torch
from families import FAMILIES
from small_models import llama
from transformers import AutoModelForCausalLM

from torch_cpullm.checkpoint import Form
from torch_cpullm.config import Settings
from torch_cpullm.folding import apply_fold, find_folds, matrix
from torch_cpullm.layerwise import Method, calibrate, capture, decoder_layers, look, quantize, run_layer
from torch_cpullm.linear import PackedLinear
from torch_cpullm.packing import dequantize, unpack
from torch_cpullm.trial import apply, forms_of, twin

BY_NAME = {family.name: family for family in FAMILIES}
SETTINGS = Settings(compute="fp32")


def tokens(model, sequences=3, length=24, seed=0):
    size = model.get_input_embeddings().num_embeddings
    return torch.randint(size, (sequences, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits.float()


def loss_of(model, reference, ids):
    return float((logits(model, ids) - reference).square().mean())


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())


# ---- folds ----------------------------------------------------------------------------------------------------------

# What can be folded: readers of the norms; v -> o where v stands alone; up -> down where nothing bends in between.
FOLDS = {
    "llama": {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"},  # 5 heads share one v
    "qwen3": {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"},
    "gemma2": {"input_layernorm", "pre_feedforward_layernorm", "self_attn.v_proj", "mlp.up_proj"},  # gain + 1
    "phi3": {"input_layernorm", "post_attention_layernorm"},  # fused qkv and gate_up
    "gpt-neox": {"input_layernorm", "post_attention_layernorm"},  # parallel, two norms, fused qkv, GELU
    "gpt-j": {"ln_1", "attn.v_proj"},  # parallel, one norm for attention and MLP
    "falcon": {"input_layernorm"},  # the same, fused
    "gpt2": {"ln_1", "ln_2"},  # Conv1D
    "opt": {"self_attn.v_proj", "fc1"},  # norms come last; ReLU lets scales through
    "mixtral": {"input_layernorm", "self_attn.v_proj"},  # experts read their norm by other ways
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds_leave_the_layer_as_it_was(name):
    """Random scales in every place that the structure offers: kept where the output stays, undone where not."""
    model = BY_NAME[name].build()
    ids = tokens(model, 2)
    prefix, layers = decoder_layers(model)
    inputs, calls = capture(model, layers, ids)
    layer = copy.deepcopy(layers[0])
    linears = [n for n in forms_of(model, SETTINGS) if n.startswith(f"{prefix}.0.")]
    linears = [n.removeprefix(f"{prefix}.0.") for n in linears]
    with torch.no_grad():
        seen = look(layer, linears, inputs, calls[0], "")
        before = run_layer(layer, inputs[1], calls[0])
        kept = set()
        x = inputs[0]
        for fold in find_folds(layer, list(seen.shared), seen.sources):
            k = matrix(layer.get_submodule(fold.readers[0])).shape[1]
            channels = k if fold.spread is None else int(fold.spread.max()) + 1
            scales = 0.5 + torch.rand(channels, generator=torch.Generator().manual_seed(1))
            state = snapshot(layer)
            if apply_fold(
                layer, fold, scales, lambda: run_layer(layer, x, calls[0]), run_layer(layer, x, calls[0]) - x
            ):
                kept.add(fold.source)
            else:
                assert same(layer, state), fold
        after = run_layer(layer, inputs[1], calls[0])
    assert kept == FOLDS[name]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-4 * float(before.abs().max()))


# ---- calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [Method("gptq"), Method("gptq", "awq", 1)], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "phi3", "gpt2", "falcon", "qwen3-moe", "bloom"])
def test_calibrated_models_are_closer_than_rounded_ones(name, recipe):
    model = BY_NAME[name].build()
    ids, held_out = tokens(model, 24, 32), tokens(model, 3, 32, seed=9)
    reference, before = logits(model, held_out), snapshot(model)
    forms = forms_of(model, SETTINGS)
    plain = apply(twin(model), calibrate(model, ids[:1], forms, Method("rtn"), progress=False), SETTINGS)
    found = calibrate(model, ids, forms, recipe, progress=False)
    assert same(model, before)
    better = apply(twin(model), found, SETTINGS)
    assert same(model, before)
    assert loss_of(better, reference, held_out) < loss_of(plain, reference, held_out)


def test_rounding_to_nearest_is_what_optimize_does():
    import torch_cpullm

    model = llama()
    found = calibrate(model, tokens(model), forms_of(model, SETTINGS), Method("rtn"), progress=False)
    mine, theirs = apply(twin(model), found, SETTINGS), torch_cpullm.optimize(model, SETTINGS)
    for name, module in theirs.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(module.packed.codes, mine.get_submodule(name).packed.codes)
            assert torch.equal(module.packed.scales, mine.get_submodule(name).packed.scales)


def test_save_and_reload_bit_identical_with_mixed_forms(tmp_path):
    model = llama(tied=False)
    forms = forms_of(model, SETTINGS)
    for index, name in enumerate(sorted(forms)):
        if "layers" in name:
            forms[name] = (Form(4, 64, "none", "float16"), Form(8, 32, "none", "float16"))[index % 2]
    forms["model.layers.1.mlp.down_proj"] = Form(4, 32, "minimum", "float16")
    ids = tokens(model, 8)
    apply(model, calibrate(model, ids, forms, Method("gptq", "awq", 1), progress=False), SETTINGS)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model, ids), logits(again, ids))


def test_linears_of_one_input_are_rounded_together_as_if_apart():
    """And a layer runs no further than its last input, which leaves its statistics as they are."""
    model = llama().eval()
    ids, method, form = tokens(model, 5, 24), Method("gptq", sweeps=1), Form(4, 32, "point", "float16")
    prefix, layers = decoder_layers(model)
    names = [name for name, module in layers[0].named_modules() if isinstance(module, torch.nn.Linear)]
    inputs, calls = capture(model, layers, ids)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    layer = copy.deepcopy(layers[0])
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: rows[name].append(x[0][0].clone()))
        for name in names
    ]
    for x in inputs:
        run_layer(layer, x, calls[0])
    for hook in hooks:
        hook.remove()
    seen = look(layer, names, inputs, calls[0], "")
    assert seen.shared["self_attn.k_proj"] == seen.shared["self_attn.v_proj"] == "self_attn.q_proj"
    found = calibrate(model, ids, {f"{prefix}.0.{name}": form for name in names}, method, progress=False)
    for name in names:
        x, statistics = torch.cat(rows[name]), seen.statistics[seen.shared[name]]
        torch.testing.assert_close(statistics.second, x.T @ x / len(x))
        assert statistics.rows == len(x)
        apart = quantize(matrix(layers[0].get_submodule(name)), statistics, form, method)
        together = unpack(found.packed[f"{prefix}.0.{name}"])
        assert (apart.codes == together.codes).float().mean() > 0.999
        torch.testing.assert_close(apart.scales, together.scales, rtol=2e-3, atol=0)


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    import torch_cpullm.layerwise as module

    model = llama()
    ids, forms, recipe = tokens(model, 4), forms_of(model, SETTINGS), Method("gptq", "awq", 1)
    whole = calibrate(model, ids, forms, recipe, folder=tmp_path / "whole", progress=False)
    original = module.write_layer

    def killed(path, key, layer):
        original(path, key, layer)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, ids, forms, recipe, folder=tmp_path / "stopped", progress=False)
    monkeypatch.setattr(module, "write_layer", original)
    assert len(list((tmp_path / "stopped").iterdir())) == 1
    resumed = calibrate(model, ids, forms, recipe, folder=tmp_path / "stopped", progress=False)
    for name in ("layer-0000.safetensors", "layer-0001.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name, packed in whole.packed.items():
        assert torch.equal(packed.codes, resumed.packed[name].codes), name
    with pytest.raises(ValueError, match="is of another model, recipe or calibration text"):
        calibrate(model, ids, forms, Method("gptq"), folder=tmp_path / "whole", progress=False)
    (tmp_path / "whole/layer-0001.safetensors").write_bytes(b"\0" * 30)
    with pytest.raises(ValueError, match="no whole safetensors file"):
        calibrate(model, ids, forms, recipe, folder=tmp_path / "whole", progress=False)
    shutil.copy(tmp_path / "whole/layer-0000.safetensors", tmp_path / "whole/layer-0001.safetensors")
    again = calibrate(model, ids, forms, recipe, folder=tmp_path / "whole", progress=False)
    assert again.packed.keys() == whole.packed.keys()


def test_bad_input():
    model = llama()
    forms = forms_of(model, SETTINGS)
    with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.95, got 0\.\.96"):
        calibrate(model, torch.tensor([[0, 96]]), forms, Method())
    with pytest.raises(ValueError, match=r"must be \[sequences, tokens\]"):
        calibrate(model, torch.tensor([0, 1]), forms, Method())
    with pytest.raises(ValueError, match="no list of decoder layers"):
        decoder_layers(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] = torch.nan
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"calibration: model\.layers\.1\.self_attn\.q_proj: the inputs hold NaN or inf"
    ):
        calibrate(model, tokens(model), forms, Method(), progress=False)
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == [
        "model.layers.1.input_layernorm.weight"  # NaN is not equal to itself
    ]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    for field, value in (("rounding", "best"), ("scales", "smooth"), ("sweeps", -1), ("damping", 0)):
        with pytest.raises(ValueError, match=field):
            Method(**{field: value})


def test_a_twin_is_another_model_of_the_same_memory():
    model = llama()
    other = twin(model)
    assert other is not model
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert other.lm_head.weight is not model.lm_head.weight
    assert other.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    found = calibrate(model, tokens(model), forms_of(model, SETTINGS), Method("clip"), progress=False)
    apply(other, found, SETTINGS)
    assert all(parameter.requires_grad for parameter in model.parameters())
    name = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(
        dequantize(found.packed[name]), model.get_submodule(name).weight.data, atol=0.01, rtol=0.1
    )
    found.packed["model.nothing"] = found.packed[name]
    with pytest.raises(ValueError, match=r"model\.nothing is not there"):
        apply(model, found, SETTINGS)
