"""Attention of 3 to 8 rows over int8 caches where it need not be exact; how windows are cut into items."""

import functools
import math
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from test_attention import OPTIONS, expected, inputs, options

from torch_cpullm import ops

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("rows", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("dim", [64, 128])
def test_few_rows_over_codes(rows, dim, isa):
    """Integers of 16 bits, relative to their row's largest: 2^-12 of the largest values is more than they may be off.

    Blocks are 256 keys, words four, tiles 32: lengths that end within each. The codes and scales of keys that nobody
    sees are read by nobody.
    """
    for t in (1, 3, 37, 255, 301, 513):
        q, *caches = inputs((2, 2 * rows, 2, 1, t, dim), torch.float32)
        codes = [torch.full((2, 2, t + 5, dim), -128, dtype=torch.int8) for _ in range(2)]
        scales = [torch.full((2, 2, t + 5), math.nan) for _ in range(2)]
        for x, code, scale in zip(caches, codes, scales, strict=True):
            ops.cache_append(x.transpose(1, 2).contiguous(), code, scale, 0)
        k, v = (code[:, :, :t].double() * scale[:, :, :t, None] for code, scale in zip(codes, scales, strict=True))
        pad = torch.ones(2, 1, 1, t, dtype=torch.bool)
        pad[1, ..., : t // 2] = False
        long = {"window": 270, "softcap": 3.0, "sinks": torch.randn(2 * rows)}
        more = {"padding": {"mask": pad}, "long window": long}
        cases = {name: options(name, (2, 2 * rows, 2, 1, t, dim), torch.float32) for name in OPTIONS} | more
        for name, given in cases.items():
            unseen = max(0, t - given.get("window", t))
            call = functools.partial(ops.attention, q, *codes, scale=0.3, length=t, **given)
            wrong = [scale.index_fill(2, torch.arange(unseen), math.nan) for scale in scales]
            got = call(k_scale=wrong[0], v_scale=wrong[1], exact=False)
            want = expected(q, k, v, scale=0.3, **given)
            most = expected(q, k, v.abs().amax(-1, keepdim=True).expand_as(v), scale=0.3, **given)
            assert bool(((got - want).abs() <= 2.0**-12 * most + 1e-6).all()), (t, name)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_few_rows_over_codes_show_what_is_not_finite(bad, isa):
    q, *_ = inputs((1, 4, 1, 1, 300, 64), torch.float32)
    q = q.contiguous()
    codes = torch.randint(-127, 128, (1, 1, 300, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    scales = torch.full((1, 1, 300), 0.01)
    one = functools.partial(ops.attention, scale=0.2, exact=False)
    q[0, 1, 0, 3] = bad
    got = one(q, codes, codes, k_scale=scales, v_scale=scales)
    assert bool(got[0, 0, 1].isnan().all())
    assert bool(got[0, 0, [0, 2, 3]].isfinite().all())
    q[0, 1, 0, 3] = 0.0
    wrong = scales.clone()
    wrong[..., 290] = bad
    assert not bool(one(q, codes, codes, k_scale=scales, v_scale=wrong).isfinite().any())
    got = one(q, codes, codes, k_scale=wrong, v_scale=scales)
    assert bad == math.inf or not bool(got.isfinite().any())  # -inf is a score like others
    assert bool(one(q, codes, codes, k_scale=wrong, v_scale=wrong, window=9).isfinite().all())


@pytest.mark.skipif(not (ROOT / "csrc/kernels/block.h").exists(), reason="needs the sources of a checkout")
def test_items_cover_what_a_window_shows_and_no_more(tmp_path):
    """8192 keys of which 512 are seen are as many items as 512 keys."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    program = tmp_path / "attention_items"
    command = [*compiler, "-std=c++17", "-O1", "-Icsrc", "tests/attention_items.cpp", "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    windowed, short = done.stdout.split()
    assert windowed == short


@pytest.mark.parametrize("window", [1, 64, 200, 512])
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_windows_of_long_caches(window, queries, isa):
    q, k, v = inputs((2, 6, 2, queries, 1500, 64), torch.float32)
    for x in (k, v):
        x[:, :, : 1500 - queries + 1 - window] = math.nan
    got = ops.attention(q, k, v, scale=0.125, window=window)
    first = 1500 - queries + 1 - window
    want = expected(q, k[:, :, first:], v[:, :, first:], scale=0.125, window=window)
    assert torch.allclose(got.double(), want, atol=1e-5)
