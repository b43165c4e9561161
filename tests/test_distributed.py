"""CQIL groups over ranks: what they compute, keep and send, what they refuse, and ranks that die or hang."""

import copy
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layer_models import ALL
from ranks import Operators, run

import torch_cpullm
from torch_cpullm import collective, cqil, distributed, ops
from torch_cpullm.layer_match import decoders

IDS = torch.tensor([[5, 17, 3, 40, 22, 9, 31], [7, 7, 20, 33, 1, 4, 90]])
PAIRS = ((1, 2), (3, 2))
WIDTH = ALL["llama"].options["hidden_size"]


def llama(groups=PAIRS, mode="cqil", bypass=0, packed=False, layers=6, **options):
    family = ALL["llama"]
    model = type(family)("llama", family.config, {**family.options, "num_hidden_layers": layers, **options}).build()
    if groups:
        cqil.apply(model, cqil.Plan.of(model, groups, mode, bypass))
    return torch_cpullm.optimize(model) if packed else model


def generated(model, **options):
    torch.manual_seed(3)
    return model.generate(IDS, max_new_tokens=8, **options).tolist()


SAMPLING = {"do_sample": True, "temperature": 1.5}


def share(rank, packed, transport):
    """The same on two ranks and in one process."""
    one, mine = llama(packed=packed), distributed.shard_groups(llama(packed=packed), transport=transport)
    want, got = one(IDS).logits, mine(IDS).logits
    first = distributed.traffic(mine)
    out = mine(IDS, use_cache=True)
    before = distributed.traffic(mine)
    with Operators() as operators:
        step = mine(torch.tensor([[8], [9]]), past_key_values=out.past_key_values, use_cache=True)
    after = distributed.traffic(mine)
    again = one(torch.tensor([[8], [9]]), past_key_values=one(IDS, use_cache=True).past_key_values, use_cache=True)
    return {
        "difference": float((got - want).abs().max() / want.abs().max()),
        "step": float((step.logits - again.logits).abs().max() / want.abs().max()),
        "traffic": first,
        "step's traffic": [b - a for a, b in zip(before, after, strict=True)],
        "operators": operators.calls,
        "transport": distributed.transport(mine),
        "slots": [layer.get_seq_length() for layer in step.past_key_values.layers],
        "greedy": [generated(mine, do_sample=False), generated(one, do_sample=False)],
        "sampled": [generated(mine, **SAMPLING), generated(one, **SAMPLING)],
        "beams": [generated(mine, num_beams=2), generated(one, num_beams=2)] if not packed else [0, 0],
        "bytes": [_bytes(mine), _bytes(one)],
        "levels": [(row.level, row.reason) for row in torch_cpullm.report(mine).layers],
    }


def _bytes(model):
    """Of the layers in groups."""
    rows = torch_cpullm.report(model).rows
    inside = [f"model.layers.{first + i}." for first, size in PAIRS for i in range(size)]
    return sum(row.bytes_after for row in rows if row.name.startswith(tuple(inside)))


@pytest.mark.parametrize(("packed", "transport"), [(False, "gloo"), (True, "shared memory"), (True, "auto")])
def test_two_ranks_equal_one_process(packed, transport, tmp_path):
    found = run(share, tmp_path, packed, transport)
    for rank, each in enumerate(found):
        assert "error" not in each, each
        assert each["difference"] < (2e-2 if packed else 1e-5), "activations in INT8 see every rounding"
        assert each["step"] < (2e-2 if packed else 1e-5)
        assert each["transport"] == transport or transport == "auto"
        assert each["traffic"] == [2, 2 * IDS.numel() * WIDTH * 4], "one sum of float32 per group"
        assert each["slots"] == [8, *[0 if i % 2 != rank else 8 for _ in PAIRS for i in range(2)], 8]
        for kind in ("greedy", "sampled", "beams"):
            assert each[kind] == found[0][kind], "all ranks go on with the same tokens"
            assert packed or each[kind][0] == each[kind][1]
        if packed:
            away, here = ("per-linear ops", "another rank computes it"), ("one op per group", "")
            mine = [("one op", "") if i in (0, 5) else here if (i - 1) % 2 == rank else away for i in range(6)]
            assert [tuple(level) for level in each["levels"]] == mine
            inside = each["transport"] == "shared memory"
            assert each["operators"] == ({"layers_forward": 1} if inside else {"layer_forward": 2, "layers_forward": 2})
            assert each["step's traffic"] == [2, 2 * 2 * WIDTH * 4], "one sum per group, in the operator too"
    assert sum(each["bytes"][0] for each in found) == found[0]["bytes"][1], "every weight is on one rank"


def four(rank):
    """A group of four, on as many ranks."""
    one, mine = llama(((1, 4),)), distributed.shard_groups(llama(((1, 4),)))
    difference = float((mine(IDS).logits - one(IDS).logits).abs().max())
    kept = [i for i, layer in enumerate(next(decoders(mine)).layers) if not isinstance(layer, distributed.Elsewhere)]
    return {"difference": difference, "kept": kept, "tokens": [generated(m, do_sample=False) for m in (mine, one)]}


def test_four_ranks_equal_one_process(tmp_path):
    for rank, each in enumerate(run(four, tmp_path, world=4)):
        assert each["difference"] < 1e-4
        assert each["kept"] == [0, 1 + rank, 5]
        assert each["tokens"][0] == each["tokens"][1]


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(rank):
    """Name -> what shard_groups says, on this rank."""
    different = [lambda: llama(), lambda: llama(((2, 2),))][rank]
    wider = [lambda: llama(), lambda: llama(intermediate_size=96)][rank]
    cases = {
        "no groups": lambda: llama(()),
        "lp": lambda: llama(mode="lp"),
        "bypass": lambda: llama(bypass=1),
        "three": lambda: llama(((1, 3),)),
        "first": lambda: llama(((0, 2),)),
        "plans": different,
        "models": wider,
        "type": lambda: "a model",
    }
    found = {name: _text(distributed.shard_groups, build()) for name, build in cases.items()}
    found["transport"] = _text(distributed.shard_groups, llama(), transport="pigeon")
    found["time"] = _text(distributed.shard_groups, llama(), timeout_s=0)
    version, distributed.__version__ = distributed.__version__, f"9.{rank}"
    found["versions"] = _text(distributed.shard_groups, llama())
    distributed.__version__ = version
    model = distributed.shard_groups(llama())
    found["restore"], found["copy"] = _text(cqil.restore, model), _text(copy.deepcopy, model)
    found["twice"] = _text(distributed.shard_groups, model)
    found["save"] = _text(model.save_pretrained, "nowhere")
    return found


def _text(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


REFUSED = {
    "no groups": "ValueError: the model has no CQIL groups to spread over ranks",
    "lp": "ValueError: only groups of mode 'cqil' with bypass 0 spread over ranks: layers 1 to 2 have mode 'lp'",
    "bypass": "have mode 'cqil', bypass 1",
    "three": "ValueError: layers 1 to 3 are 3 members, which 2 ranks do not divide",
    "first": "ValueError: layer 0 must be on every rank",
    "plans": "ValueError: the model must be the same on all ranks: LlamaForCausalLM",
    "models": "ValueError: the model must be the same on all ranks",
    "type": "TypeError: model must be a torch.nn.Module, got str",
    "transport": "ValueError: transport must be one of auto, gloo, shared memory, got 'pigeon'",
    "time": "ValueError: timeout_s must be positive, got 0",
    "versions": "ValueError: the packages must be the same on all ranks: torch_cpullm 9.0",
    "twice": "ValueError: the model is sharded already",
    "restore": "ValueError: the model's groups are spread over ranks, for good",
    "copy": "RuntimeError: a model whose layers are spread over ranks cannot be copied",
    "save": "RuntimeError: a sharded model holds only this rank's share",
}


def test_what_does_not_fit_is_refused_on_every_rank(tmp_path):
    for found in run(refused, tmp_path):
        assert found.keys() == REFUSED.keys(), found
        for name, text in REFUSED.items():
            assert text in found[name], name


def test_one_process_has_nothing_to_share(tmp_path):
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        distributed.shard_groups(llama())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="a process group of one rank has nothing to share"):
            distributed.shard_groups(llama())
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="the model is not sharded"):
        distributed.traffic(llama())


# ---- ranks that do not answer ---------------------------------------------------------------------------------------


def interrupted(rank, what, transport, folder):
    """Generate until rank 1 is killed, or sleeps, in the third pass."""
    model = distributed.shard_groups(llama(), timeout_s=2, transport=transport)
    passes = []

    def third(*_):
        passes.append(1)
        if len(passes) == 3 and rank == 1:
            (folder / "at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL) if what == "kill" else time.sleep(5)

    next(decoders(model)).layers[0].register_forward_hook(third)
    generated(model, do_sample=False)


@pytest.mark.parametrize("transport", ["gloo", "shared memory"])
@pytest.mark.parametrize("what", ["kill", "sleep"])
def test_a_rank_that_is_lost_ends_the_others(what, transport, tmp_path):
    found = run(interrupted, tmp_path / "ranks", what, transport, tmp_path)
    assert not list(Path("/dev/shm").glob("cpullm_*")), "the memory has no name by then"
    lost_at = float((tmp_path / "at").read_text())
    assert "LostRankError: rank 0 of 2: another rank has ended, or has not answered for 2 s" in found[0]["error"]
    assert found[0]["at"] - lost_at < 10
    if what == "kill":
        assert found[1] == {"died": -signal.SIGKILL}
    else:
        assert "rank 1 of 2: another rank has ended" in found[1]["error"], "it finds the others gone when it wakes"


def test_an_all_reduce_is_timed():
    seconds, transport = collective.all_reduce_seconds(64, rounds=20)
    assert 0 < seconds < 1
    assert transport in ("gloo", "shared memory")


# ---- sums in shared memory ------------------------------------------------------------------------------------------


def test_sums_in_shared_memory():
    """Ranks as threads: the same bits on all, however far one runs ahead."""
    shared, count, rounds = torch.zeros(3 * (64 + 2 * 1024), dtype=torch.uint8), 3, 20
    values = torch.randn(count, rounds, 5, 100)  # two rows at a time: three parts
    found = torch.zeros_like(values)

    def rank(index):
        for i in range(rounds):
            x = values[index, i].clone()
            assert ops.shared_sum(x, shared, index, count, 30.0)
            found[index, i] = x

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(rank, range(count)))
    for got in found:
        assert torch.equal(got, values[0] + values[1] + values[2])


def test_a_sum_does_not_wait_for_ever():
    x, start = torch.ones(4), time.monotonic()
    assert not ops.shared_sum(x, torch.zeros(4096, dtype=torch.uint8), 0, 2, 0.1)
    assert 0.1 <= time.monotonic() - start < 5


def test_a_rank_that_comes_late_takes_no_old_numbers():
    """The other one has given up in the middle of its parts: every part, and every later sum, is refused at once."""
    shared = torch.zeros(2 * (64 + 2 * 64), dtype=torch.uint8)
    assert not ops.shared_sum(torch.ones(9, 16), shared, 0, 2, 0.1)
    start = time.monotonic()
    for rank in (1, 0, 1):
        assert not ops.shared_sum(torch.ones(3, 16), shared, rank, 2, 30.0)
    assert time.monotonic() - start < 5


def test_one_thread_at_a_time_and_none_after_a_loss():
    ranks = collective.Ranks.__new__(collective.Ranks)
    ranks.rank, ranks.size, ranks.timeout_s, ranks.all_reduces, ranks.bytes = 0, 2, 0.1, 0, 0
    ranks._shared, ranks._dead, ranks._lock = torch.zeros(4096, dtype=torch.uint8), [], threading.Lock()
    ranks._name = "rank 0 of 2"
    with ranks._lock, pytest.raises(RuntimeError, match="two threads call a model at once"):
        ranks.sum(torch.ones(4))
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(collective.LostRankError, match=r"has not answered for 0\.1 s"):
            ranks.sum(torch.ones(4))
    assert time.monotonic() - start < 0.05, "the second one does not wait"


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf")])
def test_sums_need_an_end(timeout_s):
    with pytest.raises(RuntimeError, match="timeout_s must lie in"):
        ops.shared_sum(torch.ones(1), torch.zeros(4096, dtype=torch.uint8), 0, 2, timeout_s)


def test_sums_refuse_what_does_not_fit():
    shared = torch.zeros(2 * (64 + 2 * 64), dtype=torch.uint8)
    for x, memory, rank, ranks, text in (
        (torch.ones(4, dtype=torch.float64), shared, 0, 2, "x must be a contiguous float32"),
        (torch.ones(4, 4).T, shared, 0, 2, "x must be a contiguous float32"),
        (torch.tensor(1.0), shared, 0, 2, "at least one dimension"),
        (torch.ones(4), shared.int(), 0, 2, "shared must be a contiguous uint8"),
        (torch.ones(4), shared[1:], 0, 2, "aligned to 64 bytes"),
        (torch.ones(4), shared, 2, 2, "rank must lie in"),
        (torch.ones(4), shared, -1, 2, "rank must lie in"),
        (torch.ones(4), shared, 0, 65, "rank must lie in"),
        (torch.ones(17), shared, 0, 2, "room for 64 bytes per rank, a row has 68"),
        (torch.ones(1), shared[:0], 0, 2, "room for"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ops.shared_sum(x, memory, rank, ranks, 1.0)


def test_a_group_that_moves_no_cpu_tensors_is_told_so(monkeypatch):
    monkeypatch.setattr(collective.dist, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(ValueError, match=r"backend \(cuda:nccl\) moves no CPU tensors: init_process_group"):
        collective.meet(None)
