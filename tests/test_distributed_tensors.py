"""Tensor parallel over two and four ranks: logits, tokens, bytes and all-reduces, and layers that cannot be cut."""

import pytest
import torch
from families import LLAMA_LIKE, Family
from layer_models import ALL
from ranks import Operators, run
from transformers import DynamicCache, StaticCache

import torch_cpullm
from torch_cpullm import cqil, distributed

IDS = torch.tensor([[5, 17, 3, 40, 22, 9, 31], [7, 7, 20, 33, 1, 4, 90]])
# 300: ten groups of 32, the last one short, so five for each rank.
SIZES = {"hidden_size": 128, "intermediate_size": 300, "num_attention_heads": 8, "num_key_value_heads": 4}
FAMILIES = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),  # norms of queries and keys per head
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5}),  # norms behind
    "phi": ("PhiConfig", {"num_key_value_heads": 8}),  # attention and MLP read the same
    "opt": ("OPTConfig", {"ffn_dim": 300, "word_embed_proj_dim": 128, "num_key_value_heads": 8}),  # two linears
}


def built(name, compute="int8", group_size=32, **options):
    config, own = FAMILIES[name]
    model = Family(name, config, {**LLAMA_LIKE, **SIZES, **own, **options}).build()
    return torch_cpullm.optimize(model, torch_cpullm.CpuLlmConfig(compute=compute, group_size=group_size))


def share(rank, cases):
    """What each case gives on the ranks and in one process."""
    return [shared(*case) for case in cases]


def shared(name, compute, transport, kv_heads):
    one, mine = (built(name, compute, num_key_value_heads=kv_heads) for _ in range(2))
    distributed.shard_tensors(mine, transport=transport)
    before = distributed.traffic(mine)
    want, got = one(IDS).logits, mine(IDS).logits
    after = distributed.traffic(mine)
    exact = one if compute == "fp32" else built(name, "fp32", num_key_value_heads=kv_heads)
    padded = {"attention_mask": torch.tensor([[1] * 7, [0, 0] + [1] * 5]), "max_new_tokens": 8, "do_sample": False}
    tokens = [m.generate(IDS, **padded).tolist() for m in (mine, one)]
    chosen = [m.generate(IDS, max_new_tokens=8, do_sample=False).tolist() for m in (mine, one)]
    out = mine(IDS, use_cache=True)
    with Operators() as operators:
        mine(torch.tensor([[8], [9]]), past_key_values=out.past_key_values, position_ids=torch.full((2, 1), 7))
    return {
        "difference": float((got - want).abs().max() / want.abs().max()),
        "errors": [float((logits - exact(IDS).logits).norm()) for logits in (got, want)],
        "sums": [b - a for a, b in zip(before, after, strict=True)],
        "tokens": [tokens, chosen],
        "bytes": [_bytes(mine), _bytes(one)],
        "kv heads": out.past_key_values.layers[0].keys.shape[1],
        "report": str(torch_cpullm.report(mine)),
        "operators": operators.calls,
    }


def _bytes(model):
    return sum(row.bytes_after for row in torch_cpullm.report(model).rows if ".layers." in row.name and row.bits)


MEMORY, GLOO = "shared memory", "gloo"
# (family, compute, transport, heads of keys) by number of ranks; 32 rows of keys for each rank: fewer would be padded.
CASES = {
    2: [
        ("llama", "fp32", GLOO, 4),
        ("llama", "int8", MEMORY, 4),
        ("qwen3", "int8", MEMORY, 4),
        ("gemma2", "fp32", GLOO, 4),
        ("gemma2", "fp32", MEMORY, 4),
        ("opt", "fp32", MEMORY, 8),
        ("phi", "fp32", GLOO, 8),
        ("phi", "fp32", MEMORY, 8),
    ],
    4: [("llama", "fp32", MEMORY, 8), ("llama", "int8", GLOO, 8)],  # two or three of the MLP's ten groups each
}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world, tmp_path):
    found = run(share, tmp_path, CASES[world], world=world)
    assert not [each for each in found if "error" in each], found
    for i, (name, compute, transport, kv_heads) in enumerate(CASES[world]):
        ranks = [each[i] for each in found]
        for each in ranks:
            if compute == "fp32":
                assert each["difference"] < 1e-4, name
            else:  # cut inputs fall into other blocks of 128, which are rounded to INT8 on scales of their own
                assert each["errors"][0] < 1.5 * each["errors"][1], name
            sums = 2 if name == "phi" else 4
            assert each["sums"] == [sums, sums * IDS.numel() * 128 * 4], (
                "two sums of float32 per layer, one if parallel"
            )
            for mine, one in each["tokens"]:
                assert compute == "int8" or mine == one, name
            assert each["tokens"] == [
                [mine, own[1]] for (mine, _), own in zip(ranks[0]["tokens"], each["tokens"], strict=True)
            ]
            assert each["kv heads"] == kv_heads // world, "a share of the cache"
            level = "one op" if transport == MEMORY else "two ops"
            assert f"2 of 2 as {level}" in each["report"], each["report"]
            if transport == GLOO:
                assert each["operators"] == {"layer_attention": 2, "layer_mlp": 2}, name
            else:
                assert each["operators"] == {"layers_forward": 1}, name
        assert sum(each["bytes"][0] for each in ranks) == ranks[0]["bytes"][1], "every weight is on one rank"


def refused(_):
    """Name -> what shard_tensors says."""
    cases = {
        "float": lambda: ALL["llama"].build(),
        "heads": lambda: built("llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=96),
        "kv heads": lambda: built("llama", num_key_value_heads=1),
        "groups": lambda: built("llama", group_size=128),
        "rows": lambda: built("llama", group_size=-1),
        "mlp": lambda: built("llama", intermediate_size=24),
        "fused": lambda: torch_cpullm.optimize(ALL["phi3"].build()),
        "unknown": lambda: torch_cpullm.optimize(ALL["mpt"].build()),
        "order": lambda: _ordered(built("llama")),
        "group": lambda: _grouped(built("llama")),
        "none": lambda: torch.nn.Linear(32, 32),
    }
    found = {}
    for name, build in cases.items():
        try:
            distributed.shard_tensors(build())
        except ValueError as error:
            found[name] = str(error)
    return found


def _grouped(model):
    return cqil.apply(model, cqil.Plan.of(model, [(0, 2)]))


def _ordered(model):
    for layer in model.model.layers:
        linear = layer.mlp.down_proj
        linear.order = torch.arange(linear.in_features, dtype=torch.int32).flip(0)
    return model


REFUSED = {
    "float": "the model has no packed decoder layers to cut",
    "heads": "model.layers.0 cannot be cut among 2 ranks: its 6 heads, 3 of keys and values, do not divide",
    "kv heads": "its 8 heads, 1 of keys and values, do not divide",
    "groups": "128 inputs of its attention's output, in groups of 128, do not divide",
    "rows": "128 inputs of its attention's output, in groups of 128, do not divide",
    "mlp": "24 inputs of its MLP's output are fewer than 2 groups of 32",
    "fused": "its linears are fused",
    "unknown": "alibi",
    "order": "in an order of their own (desc_act)",
    "group": "it is in a CQIL group",
    "none": "the model has no packed decoder layers to cut",
}


def test_what_cannot_be_cut_is_refused_on_every_rank(tmp_path):
    for found in run(refused, tmp_path):
        assert found.keys() == REFUSED.keys(), found
        for name, text in REFUSED.items():
            assert text in found[name], name


def static(_):
    """What a cut model does with transformers' caches: those that see its keys first fit, one made for all does not."""
    model = distributed.shard_tensors(built("llama"))
    whole = StaticCache(model.config, max_cache_len=32)
    whole.early_initialization(2, 4, 16, torch.float32, torch.device("cpu"))
    caches = [None, StaticCache(model.config, max_cache_len=32), DynamicCache(config=model.config), whole]
    found = []
    for cache in caches:
        try:
            out = model.generate(IDS, max_new_tokens=4, do_sample=False, past_key_values=cache)
        except ValueError as error:
            found.append(str(error))
        else:
            found.append(out.tolist())
    return found


def test_a_cache_for_all_heads_is_refused(tmp_path):
    for found in run(static, tmp_path):
        assert found[0] == found[1] == found[2]
        assert "StaticCache has room for 4 heads of keys, and this rank has a share of them" in found[3]
