"""Saved models for the tests: each family optimised and saved once, and ways to change a copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from families import FAMILIES, VOCAB

import torch_cpullm
from torch_cpullm.linear import STORED

BY_NAME = {family.name: family for family in FAMILIES}
IDS = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


@cache
def optimised(name: str):
    return torch_cpullm.optimize(BY_NAME[name].build())


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for name, content in tree(source).items():
        (target / name).write_bytes(content)
    return target


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(3, 12).view(1, 9)).logits


def edit_config(path: Path, change) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


UP = "model.layers.1.mlp.up_proj"
UP_CODES, UP_SCALES, UP_ZEROS = (f"{UP}.{name}" for name in STORED)


def checkpoints(root: Path) -> Callable[[str], Path]:
    """Family name -> a checkpoint of its optimised model."""

    @cache
    def path(name: str) -> Path:
        optimised(name).save_pretrained(root / name)
        return root / name

    return path
