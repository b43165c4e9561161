"""What bench_calibration and bench_kld read and compute, without a model's file."""

import pytest
import torch
from small_models import llama
from test_layerwise import tokens

from benchmarks import bench_kld
from benchmarks.bench_calibration import recipe_of
from torch_cpullm.checkpoint import Form
from torch_cpullm.layerwise import Method


def test_recipes_of_the_command_line():
    form = Form(4, 32, "none", "float16")
    assert recipe_of("awq+gptq+2+1e,none,32") == (Method("gptq", "awq", 2, epochs=1), form, None)
    assert recipe_of("gptq+4c,none,32") == (Method("gptq", epochs=4, codes=True), form, None)
    assert recipe_of("rtn+3e,none,mix5.0") == (Method("rtn", epochs=3), form, 5.0)
    assert recipe_of("gptq,point,64") == (Method("gptq"), Form(4, 64, "point", "float16"), None)
    for text in ("gptq", "gptq+x,none,32", "best,none,32", "gptq,none,mix"):
        with pytest.raises(ValueError, match="--recipe must be like"):
            recipe_of(text)


def test_kld_of_a_model_and_of_another(monkeypatch):
    """The second half of each window is scored, against plain sums over all positions."""
    monkeypatch.setattr(bench_kld, "WINDOW", 16)
    monkeypatch.setattr(bench_kld, "SCORED", slice(8, 15))
    model, other = llama().eval(), llama().eval()
    other.model.norm.weight.data *= 1.1
    ids = tokens(model, 4, 16)
    same = bench_kld.compare(bench_kld.logits_of(model, ids), model, ids)
    assert not torch.is_inference_mode_enabled()
    assert same["KLD"] == 0
    assert same["perplexity / float"] == 1
    assert same["same top token, %"] == 100
    found = bench_kld.compare(bench_kld.logits_of(other, ids), model, ids)
    with torch.no_grad():
        a, b = (m(ids).logits.double().log_softmax(-1) for m in (other, model))
    kl = (b.exp() * (b - a)).sum(-1)[:, 8:15].mean()
    loss = -a[:, :-1].gather(-1, ids[:, 1:, None])[:, 8:, 0].mean()
    assert found["KLD"] == pytest.approx(float(kl), abs=1e-4)
    assert found["perplexity"] == pytest.approx(float(loss.exp()), abs=1e-3)
