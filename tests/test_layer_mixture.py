"""Dense layers of a mixture of experts are one operator each, like any other layer."""

import pytest
from families import Family, llama_like
from layer_models import GrowingCache, runs
from transformers import DynamicCache

import torch_cpullm
from torch_cpullm.layer import ONE_OP, layer_levels


@pytest.mark.parametrize(
    ("config", "options", "dense"),
    [
        ("Qwen3MoeConfig", {"mlp_only_layers": [1]}, [1]),
        ("Qwen3MoeConfig", {"decoder_sparse_step": 2, "num_hidden_layers": 3}, [0, 2]),
        ("Qwen2MoeConfig", {"mlp_only_layers": [0, 1], "shared_expert_intermediate_size": 52}, [0, 1]),
    ],
    ids=str,
)
def test_dense_layers_of_a_mixture_match_wherever_they_are(config, options, dense):
    options = llama_like(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=44, **options)
    model = torch_cpullm.optimize(
        Family("mixture", config, options, experts=True).build(), torch_cpullm.CpuLlmConfig(compute="fp32")
    )
    assert [i for i, (_, level, _) in enumerate(layer_levels(model)) if level == ONE_OP] == dense
    want = runs(model, DynamicCache)
    got = runs(model, lambda: GrowingCache(model.config.num_hidden_layers))
    for mine, its in zip(got, want, strict=True):
        assert float((mine - its).abs().max()) <= 1e-3 * float(its.abs().max())
