"""Small models for the tests of optimize, and a way to see that nothing about a model has changed."""

import copy
import functools

import pytest
import torch
from torch import nn

import torch_cpullm


class Tiny(nn.Module):
    """A language model's skeleton: input embedding, two blocks, a head, tied to the embedding or not."""

    def __init__(self, tied=True, dtype=torch.float32, embedding=nn.Embedding):
        super().__init__()
        torch.manual_seed(0)
        self.embed = embedding(50, 64, padding_idx=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(64), "up": nn.Linear(64, 96), "down": nn.Linear(96, 64, bias=False)})
            for _ in range(2)
        )
        self.head = nn.Linear(64, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    @torch.no_grad()
    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](nn.functional.gelu(block["up"](block["norm"](x))))
        return self.head(x)


IDS = torch.tensor([[3, 1, 49, 0], [7, 7, 20, 33]])


@functools.cache
def _llama(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def llama(tied=True):
    return copy.deepcopy(_llama(tied))


def state_of(model):
    """All that must not change when optimize refuses: modules by identity, tensors by value, flags and attributes."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "tensors": {name: (id(t), t.detach().clone()) for name, t in model.named_parameters(remove_duplicate=False)},
        "attributes": sorted(vars(model)),
        "threads": torch.get_num_threads(),
    }


def assert_unchanged(model, before):
    after = state_of(model)
    for key in ("modules", "attributes", "threads"):
        assert after[key] == before[key], key
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        if value.device.type == "cpu" and not isinstance(value, torch._subclasses.FakeTensor):
            assert torch.equal(after["tensors"][name][1].nan_to_num(), value.nan_to_num())


def refuses(model, error, text, *arguments, **options):
    """optimize raises ``error`` matching ``text`` and leaves no trace."""
    before = state_of(model)
    with pytest.raises(error, match=text):
        torch_cpullm.optimize(model, *arguments, **options)
    assert_unchanged(model, before)
