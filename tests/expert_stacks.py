"""Packed experts for the tests: shapes with the reason for each, weights, rows and choices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import activations, generator, quantized

from torch_cpullm.packing import PackedStack, pack, stack


@dataclass(frozen=True)
class Shape:
    """A mixture. form: sym, zero or minimum."""

    reason: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    group: int = 32
    form: str = "zero"
    bits: int = 4

    def __str__(self) -> str:
        return f"e{self.experts}-k{self.top_k}-h{self.hidden}-i{self.intermediate}-g{self.group}-{self.form}{self.bits}"


SHAPES = [
    Shape("whole panels and groups", 4, 2, 64, 32),
    Shape("one expert, which is always chosen", 1, 1, 32, 32, form="sym"),
    Shape("all experts are chosen", 8, 8, 96, 64, form="minimum"),
    Shape("nothing is whole: panels of gate, up and down, groups, blocks", 5, 3, 172, 45, group=64),
    Shape("gate and up share a panel", 4, 2, 80, 20, form="sym"),
    Shape("two activation blocks, a short last group", 6, 2, 160, 300, group=128),
    Shape("8 bits", 4, 3, 96, 44, form="sym", bits=8),
    Shape("per channel", 4, 1, 130, 36, group=-1),
]

ROWS = {
    1: "decode: one token, all experts read the same input",
    2: "some experts have two rows, some one",
    5: "few rows each",
    17: "some experts have whole tiles",
    33: "more rows than a tile for each expert",
}


def stacks(shape: Shape, seed: int = 0) -> tuple[PackedStack, PackedStack]:
    """(gate_up, down) with every code and zero point, scaled so that results are near one."""

    def packed(n: int, k: int, e: int) -> PackedStack:
        return pack(quantized(n, k, shape.group, shape.form, shape.bits, seed=100 * e + seed))

    gate_up = stack(shape.experts, lambda e: packed(2 * shape.intermediate, shape.hidden, e))
    return gate_up, stack(shape.experts, lambda e: packed(shape.hidden, shape.intermediate, e + 50))


def call(shape: Shape, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple:
    """(x, index, weights): rows of different size, experts without repetition, weights that do not sum to one."""
    gen = generator(31 * tokens + seed)
    chosen = [torch.randperm(shape.experts, generator=gen)[: shape.top_k] for _ in range(tokens)]
    index = torch.stack(chosen) if chosen else torch.empty(0, shape.top_k, dtype=torch.long)
    return activations(tokens, shape.hidden, dtype, seed), index, torch.rand(index.shape, generator=gen)
