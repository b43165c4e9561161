"""What every test shares: the kernel levels this machine reaches, two threads, no network."""

import os
import signal

# Before transformers is imported: a test that needs the network fails at once instead of waiting for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell's background processes ignore SIGINT, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

# Before the package is imported, which remembers the count as the one torch started with. Two: the split into threads
# is part of what is tested, and more would only wait for each other on a small machine.
torch.set_num_threads(2)

from torch_cpullm import ops  # noqa: E402

REACHABLE = [name for name, reachable in ops.isa_levels().items() if reachable]
# CPULLM_ISA caps the suite as it caps the package.
LEVELS = REACHABLE[: REACHABLE.index(ops.isa()) + 1]


def pytest_report_header(config):
    beyond = [name for name in ops.isa_levels() if name not in LEVELS]
    return (
        f"torch_cpullm: kernels {ops.isa()}, levels tested: {', '.join(LEVELS)}"
        + (f" (not tested here: {', '.join(beyond)})" if beyond else "")
        + f"; torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


@pytest.fixture(params=LEVELS)
def isa(request):
    """Run the test once per kernel level; the value is the level's name."""
    with ops.use_isa(request.param):
        assert ops.isa() == request.param
        yield request.param


@pytest.fixture(autouse=True)
def same_process_afterwards():
    """Give back torch's thread count and transformers' verbosity and progress bars, whatever the test did to them."""
    from transformers.utils import logging

    threads, verbosity, bars = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
