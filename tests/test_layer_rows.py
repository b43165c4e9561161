"""Prompts that go by blocks of rows (csrc/layer_rows.h): the same bits as whole steps, which eight threads take."""

import pytest
import torch
from layer_programs import STRUCTURES, cache_of, call, padded_mask, spec

from torch_cpullm.layer_program import Program, run_group

CACHES = {"none": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def results(specs, programs, threads, kind, batch, tokens, masked, dtype=torch.float32):
    """Outputs of a prompt and of the token after it, and what the caches hold then."""
    torch.set_num_threads(threads)
    caches = [cache_of(kind) for _ in specs]
    found, position = [], 0
    for step in (tokens, 1):
        x, cos, sin = call(specs[0], batch, step, position, dtype)
        pads = tuple(3 * i % 7 for i in range(batch))
        masks = [padded_mask(s, step, position, pads) if masked else None for s in specs]
        found.append(run_group(programs, 0, [(x, cos, sin, m, c) for m, c in zip(masks, caches, strict=True)]).clone())
        position += step if kind is not None else 0
    for cache in caches if kind is not None else ():
        found += [cache.keys.clone(), cache.values.clone()]
    return found


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("batch", "tokens", "masked"), [(1, 260, False), (3, 90, True), (5, 77, False)])
@pytest.mark.parametrize("structure", ["llama", "gemma2", "phi3", "halves not at panels"])
def test_blocks_change_no_bit(structure, batch, tokens, masked, kind):
    """Blocks that span sequences, with masks, every cache and none; on one to four threads."""
    given = {**STRUCTURES[structure]}
    layer = spec(**{**given, "linears": {**given.get("linears", {}), "compute": "int8"}})
    programs, kind = [Program(layer)], CACHES[kind]
    expected = results([layer], programs, 8, kind, batch, tokens, masked)
    for threads in (1, 2, 3, 4):
        got = results([layer], programs, threads, kind, batch, tokens, masked)
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs), threads


@pytest.mark.parametrize("tokens", [256, 257, 319, 385])
def test_blocks_of_groups(tokens):
    """Members of a group, each with its cache, in blocks of equal and of different length; bfloat16 between layers."""
    specs = [spec(**STRUCTURES["llama"], linears={"compute": "int8", "group": 64}, seed=i) for i in range(2)]
    programs = [Program(layer) for layer in specs]
    expected = results(specs, programs, 8, torch.bfloat16, 1, tokens, False, torch.bfloat16)
    for threads in (1, 2, 3):
        got = results(specs, programs, threads, torch.bfloat16, 1, tokens, False, torch.bfloat16)
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs), threads
