"""Rank 0 runs the program alone, the others follow: tokens, caches, the end, and ranks that are lost."""

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import run
from test_distributed_tensors import IDS, built

from torch_cpullm import distributed
from torch_cpullm.layer_match import decoders

ROOT = Path(__file__).resolve().parents[1]
PADDED = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
KINDS = {
    "greedy": {"do_sample": False},
    "padded": {"do_sample": False, "attention_mask": PADDED},
    "sampled": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3, "do_sample": False},  # rows of the cache change places
    "lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},  # tokens leave the cache again
}


def generated(model, name):
    torch.manual_seed(5)  # of rank 0 alone
    ids = IDS[:1].repeat(1, 2) if name == "lookup" else IDS
    return model.generate(ids, max_new_tokens=8, **KINDS[name]).tolist()


def message(call):
    try:
        call()
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def led(rank, transport):
    """Rank 0 generates in every way; the others are told of nothing but its decoder's calls."""
    model = built("llama", "fp32")
    distributed.shard_tensors(model, transport=transport)
    torch.manual_seed(rank)
    distributed.follow(model)
    if rank:
        return {"left": True}
    one = built("llama", "fp32")
    tokens = {name: [generated(model, name), generated(one, name)] for name in KINDS}
    long = torch.arange(700)[None] * 7 % 90  # more than one frame holds
    cache = model(IDS, use_cache=True).past_key_values
    calls = {
        "copy": lambda: model(IDS[:, :1], past_key_values=copy.deepcopy(cache)),
        "mask": lambda: model(IDS, past_key_values=cache, attention_mask={"full_attention": None}),
        "token": lambda: model(torch.tensor([[10**6]])),
        "again": lambda: distributed.follow(model),
    }
    errors = {name: message(call) for name, call in calls.items()}
    difference = float((model(long).logits - one(long).logits).abs().max())
    distributed.leave(model)
    distributed.leave(model)
    errors["left"] = message(lambda: model(IDS))
    errors["alone"] = message(lambda: distributed.leave(one))
    return {"tokens": tokens, "difference": difference, "errors": errors}


@pytest.mark.parametrize("transport", ["gloo", "shared memory"])
def test_the_others_follow(transport, tmp_path):
    found = run(led, tmp_path, transport)
    assert "error" not in found[0], found
    assert found[1] == {"left": True}
    for name, (mine, one) in found[0]["tokens"].items():
        assert mine == one, name
    assert found[0]["difference"] < 1e-3
    errors = found[0]["errors"]
    assert errors["copy"].startswith("ValueError: past_key_values was filled before follow(), or is a copy")
    assert errors["mask"].startswith("TypeError: the other ranks cannot be sent attention_mask = dict")
    assert "Error" in errors["token"], "all ranks meet it, and go on"
    assert errors["again"] == "ValueError: the other ranks follow this model already"
    assert errors["left"].startswith("RuntimeError: the other ranks have left this model")
    assert errors["alone"].startswith("ValueError: nobody follows this model")


# ---- ranks that are lost --------------------------------------------------------------------------------------------


def lost(rank, what, who, folder):
    """Rank ``who`` is killed or stopped in the third pass of a generation."""
    model = distributed.shard_tensors(built("llama", "fp32"), timeout_s=2)
    passes = []

    def third(*_):
        passes.append(1)
        if len(passes) == 3 and rank == who:
            (folder / "at").write_text(f"{time.time()} {os.getpid()}")
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)

    next(decoders(model)).owner.register_forward_hook(third)  # after the last sum of the pass
    try:
        distributed.follow(model)
        if rank == 0:
            model.generate(IDS, max_new_tokens=8, do_sample=False)
            distributed.leave(model)
    finally:
        if rank != who and what == "stop":
            os.kill(int((folder / "at").read_text().split()[1]), signal.SIGCONT)


@pytest.mark.parametrize(("what", "who"), [("kill", 0), ("kill", 1), ("stop", 0), ("stop", 1)])
def test_a_rank_that_is_lost_ends_the_others(what, who, tmp_path):
    found = run(lost, tmp_path / "ranks", what, who, tmp_path)
    at = float((tmp_path / "at").read_text().split()[0])
    other = 1 - who
    assert f"LostRankError: rank {other} of 2: another rank has ended, or has not answered for 2 s" in str(found[other])
    assert found[other]["at"] - at < 10
    if what == "kill":
        assert found[who] == {"died": -signal.SIGKILL}
    else:
        assert "LostRankError" in str(found[who]), "it finds the other gone when it wakes"


def in_a_prompt(rank, transport, folder):
    """Rank 1 is killed inside its second layer's operator, in a prompt of many tokens."""
    model = distributed.shard_tensors(built("llama", "fp32"), timeout_s=2, transport=transport)
    layer = next(decoders(model)).layers[1]

    def kill():
        (folder / "at").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    if rank:
        layer.register_forward_pre_hook(lambda *_: threading.Timer(0.05, kill).start())
    distributed.follow(model)
    if rank == 0:
        model(torch.arange(6000)[None] % 90)
        return {"ended": time.time()}
    return {}


@pytest.mark.parametrize("transport", ["gloo", "shared memory"])
def test_a_rank_that_is_lost_in_a_long_prompt_ends_the_others(transport, tmp_path):
    found = run(in_a_prompt, tmp_path / "ranks", transport, tmp_path)
    assert found[1] == {"died": -signal.SIGKILL}
    assert "LostRankError: rank 0 of 2: another rank has ended, or has not answered for 2 s" in str(found[0])
    assert found[0]["at"] - float((tmp_path / "at").read_text()) < 10


# ---- real programs --------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch, torch.distributed as dist, torch_cpullm
from tokenizers import Tokenizer, models, pre_tokenizers
from torch_cpullm import distributed
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, eos_token_id=None)).eval()
distributed.shard_tensors(torch_cpullm.optimize(model))
distributed.follow(model)
if dist.get_rank() == 0:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pipe = pipeline("text-generation", model=model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
    text = pipe("w5 w7 w9", max_new_tokens=5)[0]["generated_text"]
    print("goes on" if text.startswith("w5 w7 w9") else text, flush=True)
    while sys.argv[1] == "go on":
        pipe("w5 w7 w9", max_new_tokens=5)
dist.destroy_process_group()
"""


def started(folder, *arguments):
    """``cpullm run --nproc 2`` of PROGRAM as the leader of a session, with SIGINT as a terminal's processes have it."""
    script = folder / "program.py"
    script.write_text(PROGRAM)
    # A shell's background processes ignore SIGINT, and so would theirs; a rank needs a core, whatever the tests have.
    reset = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    reset += "os.sched_setaffinity(0, range(os.cpu_count())); os.execv(sys.argv[1], sys.argv[1:])"
    cpullm = [sys.executable, "-m", "torch_cpullm", "run", "--nproc", "2", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": ""}
    del environment["TORCHELASTIC_RUN_ID"]
    return subprocess.Popen(
        [sys.executable, "-c", reset, *cpullm, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
        cwd=folder,
    )


def left_of(session):
    """Process ids of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")


@cores
def test_a_pipeline_on_rank_0(tmp_path):
    process = started(tmp_path, "once")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "goes on\n"), err
    assert "cpullm run: rank 0 of 2: CPU" in err
    assert "cpullm run: rank 1 of 2: CPU" in err
    assert "Error" not in err
    assert not left_of(process.pid)


@cores
def test_ctrl_c_leaves_no_process_behind(tmp_path):
    process = started(tmp_path, "go on")
    assert process.stdout.readline() == "goes on\n"
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - start < 10
    assert not left_of(process.pid)
