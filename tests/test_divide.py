"""How a team divides the panels of a product: ranges of its own first, then what others have not come to."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from torch_cpullm import ops
from torch_cpullm.packing import PackedWeight

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not (ROOT / "csrc/team.h").exists(), reason="needs the sources of a checkout")
def test_every_item_is_computed_once_whoever_is_late(tmp_path):
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    program = tmp_path / "divide_steps"
    command = [*compiler, "-std=c++17", "-O1", "-pthread", "-Icsrc", "tests/divide_steps.cpp", "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    word, taken_over = done.stdout.split()
    assert word == "ok"
    assert int(taken_over) > 0


@pytest.mark.parametrize("compute", ["int8", "fp32", "bf16"])
def test_results_do_not_depend_on_who_computes_a_panel(compute):
    """More threads than cores: some come late, and others take their panels."""
    n, k = 2048 + 17, 2048
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (-(-n // 32), k // 4, 64), dtype=torch.uint8, generator=generator)
    weight = PackedWeight(codes, torch.full((codes.shape[0], k // 64, 32), 0.01).half(), None, n, k, 4, 64)
    before = torch.get_num_threads()
    try:
        for m in (1, 20):
            x = torch.randn(m, k, generator=generator)
            torch.set_num_threads(1)
            alone = ops.linear(x, weight, compute=compute)
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                for _ in range(8):
                    assert torch.equal(ops.linear(x, weight, compute=compute), alone)
    finally:
        torch.set_num_threads(before)


def test_a_team_has_the_threads_that_were_asked_for():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.ops.cpullm.team_barriers(100) == threads
    finally:
        torch.set_num_threads(before)
    with pytest.raises(RuntimeError, match="count must not be negative, got -1"):
        torch.ops.cpullm.team_barriers(-1)
