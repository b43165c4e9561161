"""Tiny random models of every family that the package claims, with weights that leave no logit flat.

Sizes are odd where an architecture allows it: widths that are no multiple of 32, a vocabulary of 257, one group of
weights and a half. Biases are not zero and the norms' gains not one, so that one that is lost shows. Sliding windows
are shorter than the sequences of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

VOCAB = 257
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# Prompt lookup before transformers 5.14 fails where there is no end token; -1 is one that is no token's.
LOOKUP_END = {"eos_token_id": -1} if VERSION < (5, 14) else {}
# transformers 5.0 fails at prompts in chunks unless a cache is passed.
CHUNKED = VERSION > (5, 0)
# No end token: every test gets the number of tokens it asks for.
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
# Names as Llama has them; 5 query heads share one head of keys and values unless a family says otherwise.
LLAMA_LIKE = {
    "hidden_size": 80,
    "intermediate_size": 139,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture. config: the name of its class in transformers; experts: whether it is a mixture of experts,
    whose router stays in float. gain: size of the random weights, see randomise().
    """

    name: str
    config: str
    options: dict[str, Any]
    tied: bool = False
    experts: bool = False
    gain: float = 1.5

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        """The float model in eval mode; the same one for the same seed."""
        config = getattr(transformers, self.config)(**{**TOKENS, "tie_word_embeddings": self.tied, **self.options})
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention_of(config))
        randomise(model, seed, self.gain)
        return model.to(dtype).eval()


def attention_of(config: Any) -> dict[str, str]:
    """The implementation of attention that computes what ``config`` says: up to transformers 5.20 Gemma2 runs in SDPA,
    which leaves its softcap out.
    """
    return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}


def randomise(model: nn.Module, seed: int = 0, gain: float = 1.5) -> None:
    """Seeded weights that keep activations near one and spread the logits by about three.

    gain: how much a linear enlarges its input; it has to be more where a normalised embedding, tied to the head, would
    otherwise drown the layers and the model say the same token for ever.
    """
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            module = model.get_submodule(name.rpartition(".")[0])
            if parameter.dim() < 2:
                values = 0.2 * values if name.endswith("bias") else 1 + 0.3 * values
                if "Gemma" in type(module).__name__:
                    # These add the one themselves. Those behind a layer get more, or the scaled embedding drowns it.
                    values += 3 if "post" in name else -1
            elif isinstance(module, nn.Embedding):
                values *= 0.3
            else:
                inputs = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[-1]
                values *= (3.0 if module is head else gain) * inputs**-0.5
            parameter.copy_(values)


def llama_like(**options: Any) -> dict[str, Any]:
    return {**LLAMA_LIKE, **options}


# Where experts are: torch's grouped product, which computes them in float, wants rows of a multiple of 16 bytes.
FAMILIES = [
    Family("llama", "LlamaConfig", llama_like(attention_bias=True, mlp_bias=True)),
    Family(
        "llama-tied", "LlamaConfig", llama_like(num_attention_heads=4, num_key_value_heads=2, head_dim=10), tied=True
    ),
    Family("mistral", "MistralConfig", llama_like(sliding_window=7, head_dim=24)),
    Family("qwen2", "Qwen2Config", llama_like(), tied=True),
    Family("qwen3", "Qwen3Config", llama_like(head_dim=32, hidden_size=72)),
    Family(
        "gemma2",
        "Gemma2Config",
        llama_like(head_dim=24, query_pre_attn_scalar=24, sliding_window=7, num_hidden_layers=3),
        tied=True,
    ),
    Family(
        "gemma3",
        "Gemma3TextConfig",
        llama_like(
            head_dim=24,
            query_pre_attn_scalar=24,
            sliding_window=7,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        tied=True,
    ),
    Family("phi3", "Phi3Config", llama_like(sliding_window=11)),
    Family("phi", "PhiConfig", llama_like(num_key_value_heads=5, qk_layernorm=True)),
    Family("gpt-neox", "GPTNeoXConfig", {**LLAMA_LIKE, "num_attention_heads": 4}),
    Family("gpt-j", "GPTJConfig", {"n_positions": 128, "n_embd": 80, "n_layer": 2, "n_head": 5, "rotary_dim": 8}),
    Family(
        "gpt2", "GPT2Config", {"n_positions": 128, "n_embd": 84, "n_layer": 2, "n_head": 4, "n_inner": 139}, tied=True
    ),
    Family(
        "opt",
        "OPTConfig",
        {
            "hidden_size": 80,
            "ffn_dim": 139,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 56,
            "do_layer_norm_before": False,
        },
        tied=True,
    ),
    Family(
        "falcon",
        "FalconConfig",
        {"hidden_size": 80, "num_hidden_layers": 2, "num_attention_heads": 5, "ffn_hidden_size": 139},
        tied=True,
    ),
    Family(
        "falcon-gqa",
        "FalconConfig",
        {
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bias": True,
        },
    ),
    Family(
        "mpt",
        "MptConfig",
        {"d_model": 84, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "use_cache": True},
        tied=True,
    ),
    Family("bloom", "BloomConfig", {"hidden_size": 80, "n_layer": 2, "n_head": 5}, tied=True, gain=2.0),
    Family(
        "stablelm",
        "StableLmConfig",
        llama_like(use_qkv_bias=True, qk_layernorm=True, use_parallel_residual=True),
    ),
    Family("starcoder2", "Starcoder2Config", llama_like(sliding_window=7, use_bias=True), tied=True),
    Family(
        "mixtral",
        "MixtralConfig",
        llama_like(intermediate_size=100, num_local_experts=4, num_experts_per_tok=2),
        experts=True,
    ),
    Family(
        "qwen3-moe",
        "Qwen3MoeConfig",
        llama_like(
            head_dim=32,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=44,
            norm_topk_prob=True,
            mlp_only_layers=[0],
        ),
        experts=True,
    ),
    Family(
        "qwen2-moe",
        "Qwen2MoeConfig",
        llama_like(
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=36,
            shared_expert_intermediate_size=52,
        ),
        experts=True,
    ),
]
