"""Models, a cache and runs for the tests of the layer program."""

import inspect

import torch
from families import FAMILIES, Family, llama_like
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import torch_cpullm
from torch_cpullm.layer_decoder import DecoderStep

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5],
    "original_max_position_embeddings": 16,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OPT = {
    "hidden_size": 80,
    "ffn_dim": 139,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 80,
}

MORE = [
    Family("llama3", "LlamaConfig", llama_like(rope_parameters=LLAMA3_ROPE)),
    Family(
        "phi3-longrope",
        "Phi3Config",
        llama_like(num_key_value_heads=5, rope_parameters=LONG_ROPE, original_max_position_embeddings=16),
    ),
    Family("gpt-neox-sequential", "GPTNeoXConfig", llama_like(num_attention_heads=4, use_parallel_residual=False)),
    Family("qwen3-window", "Qwen3Config", llama_like(sliding_window=5, use_sliding_window=True, max_window_layers=1)),
    Family("opt-norm-first", "OPTConfig", OPT, tied=True),
    Family("phi-plain", "PhiConfig", llama_like(num_key_value_heads=5)),
    Family("stablelm-plain", "StableLmConfig", llama_like(use_qkv_bias=True)),
    Family("stablelm-parallel", "StableLmConfig", llama_like(use_parallel_residual=True)),
    Family("olmo2", "Olmo2Config", llama_like()),
    Family(
        "granite",
        "GraniteConfig",
        llama_like(attention_multiplier=0.3, residual_multiplier=0.7, embedding_multiplier=2.0, logits_scaling=2.0),
    ),
    Family("cohere", "CohereConfig", llama_like(), tied=True),
    Family("smollm3", "SmolLM3Config", llama_like(num_key_value_heads=5, no_rope_layers=[1, 0])),
]
ALL = {family.name: family for family in (*FAMILIES, *MORE)}

WHY_NOT = {  # family -> words of the reason; every other family matches
    "phi": "LayerNorm of single heads",
    "stablelm": "q_layernorm is a norm of an unknown form",
    "gpt2": "takes 'encoder_hidden_states'",
    "opt": "no arrangement of its parts",
    "falcon-gqa": "another form than one per key head",
    "mpt": "alibi",
    "mixtral": "mlp.gate holds 'weight'",
    "qwen2-moe": "mlp.gate holds 'weight'",
    "qwen3-moe": "the module mlp.experts has no known role",
}


def optimised(name, **settings):
    """A tiny model of the family with packed linears, fp32 compute."""
    model = ALL[name].build()
    return torch_cpullm.optimize(model, torch_cpullm.config.Settings(**{"compute": "fp32", **settings}))


class GrowingLayer(DynamicLayer):
    """transformers' own cache layer with the two calls that a program makes."""

    reserved = 0

    def reserve(self, batch, tokens, kv_heads, head_dim, dtype):
        more = torch.zeros(batch, kv_heads, tokens, head_dim, dtype=dtype)
        if not self.is_initialized:
            self.lazy_initialization(more, more)
            self.keys, self.values = more[:, :, :0], more[:, :, :0]
        length = self.keys.shape[2]
        self.room = [torch.cat([kept, more], 2) for kept in (self.keys, self.values)]
        type(self).reserved += 1
        return *self.room, None, None, length

    def advance(self, tokens):
        assert tokens == self.room[0].shape[2] - self.keys.shape[2]
        self.keys, self.values = self.room


class GrowingCache(DynamicCache):
    """A cache of GrowingLayers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = [GrowingLayer() for _ in range(layers)]


def logits(model, ids, mask, cache, steps):
    """Logits of a prefill, of one token at a time and of a chunk: ids [b, n] cut into ``steps``, teacher-forced."""
    out, start = [], 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    for tokens in steps:
        end = start + tokens
        options = {"position_ids": positions[:, start:end]} if takes_positions else {}
        with torch.no_grad():
            result = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, **options)
        out.append(result.logits)
        start = end
    return torch.cat(out, 1)


def runs(model, cache):
    """Logits of a single prompt and, where the mask is not 0, of a left-padded batch; cache: makes one."""
    generator = torch.Generator().manual_seed(5)
    one = torch.randint(3, 250, (1, 24), generator=generator)
    many = torch.randint(3, 250, (3, 18), generator=generator)
    mask = torch.ones_like(many)
    for i in range(3):
        mask[i, : 3 * i] = 0
    single = logits(model, one, torch.ones_like(one), cache(), (14, 1, 1, 1, 6, 1))
    batch = logits(model, many, mask, cache(), (13, 1, 1, 3))
    return single, batch[mask.bool()]


def ids_of(model, batch, tokens):
    return torch.randint(1, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def counted(monkeypatch, method):
    """The number of decode steps in which this method of DecoderStep gave a result, as a list of one."""
    count, real = [0], getattr(DecoderStep, method)

    def run(self, *args):
        out = real(self, *args)
        count[0] += out is not None
        return out

    monkeypatch.setattr(DecoderStep, method, run)
    return count
