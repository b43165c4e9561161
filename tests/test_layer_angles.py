"""Cosines and sines from a table: the same bits as the module's, and only where its positions are independent."""

import pytest
import torch
from layer_models import ALL

from torch_cpullm.layer_angles import CHUNK, Angles


def rotary(name="llama"):
    """(module, calls): the module of a family, and the number of tokens of each of its calls."""
    module, calls = ALL[name].build().model.rotary_emb, []
    forward = type(module).forward
    kind = type(
        "Counted",
        (type(module),),
        {"forward": lambda self, x, at: (calls.append(at.shape[1]), forward(self, x, at))[1]},
    )
    module.__class__ = kind
    return module, calls


def same(angles, module, position, x):
    at = torch.full((x.shape[0], 1), position)
    got, want = angles(x, at), module(x, at)
    return len(got) == len(want) and all(
        a.dtype == b.dtype and torch.equal(a.expand_as(b), b) for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen3", "smollm3"])
def test_the_modules_bits_at_every_position(name, dtype):
    module, calls = rotary(name)
    angles, x = Angles(module, ()), torch.zeros(1, 1, 80, dtype=dtype)
    assert all(same(angles, module, position, x) for position in (*range(3, 3 * CHUNK), 2, 1000, 999))
    assert calls.count(CHUNK) == 3 + 3
    assert all(same(angles, module, position, x.expand(3, 1, 80)) for position in range(999, 1010))


def test_positions_that_differ_are_the_modules():
    module, calls = rotary()
    x, positions = torch.zeros(2, 1, 80), torch.tensor([[3], [4]])
    got, want = Angles(module, ())(x, positions), module(x, positions)
    assert all(map(torch.equal, got, want))
    assert calls == [1, 1]


@pytest.mark.parametrize("cut", [True, False], ids=["slices", "indexes"])
def test_a_module_with_a_table_of_its_own_is_not_asked_beyond_it(cut):
    class Short(torch.nn.Module):
        rope_type = "default"

        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.rand(70, 8))

        def forward(self, x, at):
            first = int(at[0, 0])
            rows = self.table[None, first : first + at.shape[1]] if cut else self.table[at]
            return rows.cos(), rows.sin()

    module, x = Short(), torch.zeros(1, 1, 8)
    angles = Angles(module, ())
    assert all(same(angles, module, position, x) for position in (0, 5, 65, 66, 69, 63, 64))


def test_forms_that_look_at_the_longest_position_are_the_modules():
    module, calls = rotary("phi3-longrope")
    angles, x = Angles(module, ()), torch.zeros(1, 1, 80)
    assert all(same(angles, module, position, x) for position in range(10, 30))
    assert set(calls) == {1}


def test_a_module_that_has_changed():
    module, calls = rotary()
    angles, x = Angles(module, ()), torch.zeros(1, 1, 80)
    assert same(angles, module, 1, x)
    module.inv_freq.mul_(2)
    assert same(angles, module, 2, x)
    module.register_buffer("inv_freq", module.inv_freq * 2, persistent=False)
    assert same(angles, module, 3, x)
    module.attention_scaling = 3.0
    assert same(angles, module, 4, x)
    assert same(angles, module, 5, x.bfloat16())
    assert calls.count(CHUNK) == 5
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    angles(x, torch.tensor([[6]]))
    assert seen == [1]
