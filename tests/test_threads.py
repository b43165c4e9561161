"""Threads: counts, several Python threads at once, and processes that fork."""

import subprocess
import sys
import threading

import pytest
import torch
from cases import activations

from torch_cpullm import ops
from torch_cpullm.packing import pack
from torch_cpullm.quant import quantize_rtn


@pytest.fixture(scope="module")
def weight():
    return pack(quantize_rtn(torch.randn(640, 384, generator=torch.Generator().manual_seed(1))))


def test_results_do_not_depend_on_the_thread_count(weight, isa):
    x = activations(19, 384)
    before = torch.get_num_threads()
    try:
        got = []
        for threads in (1, 2, 3, 5, 7):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                got.append(ops.linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, got[0]) for y in got)


def test_several_python_threads_at_once(weight):
    xs = [activations(m, 384) for m in (1, 2, 17, 40)]
    want = [ops.linear(x, weight) for x in xs]
    wrong = []

    def work(i):
        for _ in range(100):
            if not torch.equal(ops.linear(xs[i], weight), want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


FORKS = """
import os, sys, torch
from torch_cpullm import ops
from torch_cpullm.packing import pack
from torch_cpullm.quant import quantize_rtn

torch.set_num_threads(1)
torch.manual_seed(0)
weight = pack(quantize_rtn(torch.randn(2048, 512)))
torch.set_num_threads(3)
x = torch.randn(4, 512)
if {used}:
    want = ops.linear(x, weight)
child = os.fork()
if child == 0:
    got = [ops.linear(x, weight) for _ in range(3)]
    os._exit(0 if not {used} or torch.equal(got[2], want) else 1)
_, status = os.waitpid(child, 0)
assert torch.equal(ops.linear(x, weight), ops.linear(x, weight))  # the parent goes on
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("used", [True, False])
def test_a_forked_child_does_not_hang(used):
    """libgomp cannot restart its threads after a fork: the child works on one, and says so once."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS.format(used=used)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("it runs on one thread") == (1 if used else 0)
