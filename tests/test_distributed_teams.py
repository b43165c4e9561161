"""CQIL groups of tensor-parallel teams: 2 x 2 ranks against one process with the same plan, and what is refused."""

import os
import signal
import time

import torch
from ranks import Operators, run
from test_distributed_tensors import GLOO, IDS, MEMORY, built

import torch_cpullm
from torch_cpullm import cqil, distributed
from torch_cpullm.layer_match import decoders

PAIRS = ((2, 2), (4, 2))
# family -> (heads of keys, sums over all, sums over the team) of a pass of 6 layers, two of them outside the groups.
SUMS = {
    "llama": (4, 2 * 2 + 2, 2),
    "gemma2": (4, 2 * 2 + 2, 4),  # norms behind the MLP
    "phi": (8, 2 + 2, 0),  # attention and MLP read the same
    "qwen3": (2, 2, 2 * 2 + 2),  # two heads of keys: the layers outside are cut among the team alone
}


def grouped(name, compute="fp32", groups=PAIRS, mode="cqil", bypass=0, **options):
    options.setdefault("num_key_value_heads", SUMS[name][0])
    model = built(name, compute, num_hidden_layers=6, **options)
    return cqil.apply(model, cqil.Plan.of(model, groups, mode, bypass))


def spread(model, **options):
    return distributed.shard_groups(model, tp_size=2, **options)


def share(rank, cases):
    return [shared(*case) for case in cases]


def shared(name, compute, transport):
    one, mine = grouped(name, compute), spread(grouped(name, compute), transport=transport)
    ranks = distributed.ranks_of(mine)
    before = ranks.all_reduces, ranks.team.all_reduces, *distributed.traffic(mine)
    want, got = one(IDS).logits, mine(IDS).logits
    after = ranks.all_reduces, ranks.team.all_reduces, *distributed.traffic(mine)
    exact = one if compute == "fp32" else grouped(name, "fp32")
    masks = torch.tensor([[1] * 7, [0, 0] + [1] * 5]), torch.ones_like(IDS)
    tokens = [
        [m.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False).tolist() for mask in masks]
        for m in (mine, one)
    ]
    out = mine(IDS, use_cache=True)
    with Operators() as operators:
        mine(torch.tensor([[8], [9]]), past_key_values=out.past_key_values, position_ids=torch.full((2, 1), 7))
    return {
        "difference": float((got - want).abs().max() / want.abs().max()),
        "errors": [float((logits - exact(IDS).logits).norm()) for logits in (got, want)],
        "sums": [b - a for a, b in zip(before, after, strict=True)],
        "operators": operators.calls,
        "tokens": tokens,
        "slots": [layer.get_seq_length() for layer in out.past_key_values.layers],
        "kv heads": [None if layer.k is None else layer.k.shape[1] for layer in out.past_key_values.layers],
        "levels": [row.level for row in torch_cpullm.report(mine).layers],
        "bytes": [_inside(mine), _inside(one)],
    }


def _inside(model):
    """Bytes of the members of groups."""
    names = tuple(f"model.layers.{i}." for i in (2, 3, 4, 5))
    return sum(row.bytes_after for row in torch_cpullm.report(model).rows if row.name.startswith(names) and row.bits)


CASES = [
    ("llama", "fp32", MEMORY),
    ("llama", "int8", MEMORY),
    ("llama", "fp32", GLOO),
    ("gemma2", "fp32", MEMORY),
    ("gemma2", "fp32", GLOO),
    ("phi", "fp32", MEMORY),
    ("qwen3", "fp32", MEMORY),
]


def test_two_teams_of_two_equal_one_process(tmp_path):
    found = run(share, tmp_path, CASES, world=4)
    assert not [each for each in found if "error" in each or "died" in each], found
    for i, (name, compute, transport) in enumerate(CASES):
        ranks, (kv_heads, over_all, over_team) = [each[i] for each in found], SUMS[name]
        for rank, each in enumerate(ranks):
            if compute == "fp32":
                assert each["difference"] < 1e-4, (name, transport)
                assert each["tokens"][0] == each["tokens"][1], (name, transport)
            else:  # cut inputs fall into other blocks of 128, which are rounded to INT8 on scales of their own
                assert each["errors"][0] < 1.5 * each["errors"][1]
            assert each["tokens"][0] == ranks[0]["tokens"][0], "the same bits on all ranks"
            total = over_all + over_team
            assert each["sums"] == [over_all, over_team, total, total * IDS.numel() * 128 * 4], (name, transport)
            away = [i for i in range(2, 6) if i % 2 != rank // 2]
            assert each["slots"] == [0 if i in away else 8 for i in range(6)]
            outside = kv_heads // 4 or 1
            own = [None if i in away else outside if i < 2 else kv_heads // 2 for i in range(6)]
            assert each["kv heads"] == own, "a share of the cache"
            whole, member = ("one op", "one op per group") if transport == MEMORY else ("two ops", "two ops")
            levels = ["per-linear ops" if i in away else whole if i < 2 else member for i in range(6)]
            assert each["levels"] == levels
            if transport == MEMORY:
                assert each["operators"] == {"layers_forward": 1}, (name, "a step is one operator, with all its sums")
            else:
                assert each["operators"] == {"layer_attention": 4, "layer_mlp": 4}
        if name != "qwen3":  # whose 16 rows of keys are padded to 32 on each rank
            assert sum(each["bytes"][0] for each in ranks) == ranks[0]["bytes"][1], "every weight is on one rank"


def hooked(rank):
    """Layers that run linear by linear on one rank of a team, and as operators on the other."""
    differences = []
    torch.set_num_threads(2)
    for name in ("llama", "gemma2"):
        one, mine = grouped(name), spread(grouped(name), transport=MEMORY)
        if rank == 2:
            for member in (2, 3, 4, 5):
                mlp = getattr(next(decoders(mine)).layers[member], "mlp", None)
                if mlp is not None:
                    mlp.register_forward_hook(lambda *_: None)
        want = one(IDS).logits
        differences += [float((mine(IDS).logits - want).abs().max() / want.abs().max()) for _ in range(2)]
    return differences


def test_ranks_of_a_team_make_the_same_sums_either_way(tmp_path):
    for found in run(hooked, tmp_path, world=4):
        assert "error" not in found, found
        assert max(found) < 1e-4


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(_):
    """Name -> what shard_groups says, on this rank."""
    plain = {"tp_size": 2}
    cases = {
        "three": (grouped("llama"), {"tp_size": 3}),
        "none": (grouped("llama"), {"tp_size": 0}),
        "text": (grouped("llama"), {"tp_size": "2"}),
        "members": (grouped("llama", groups=((2, 3),)), plain),
        "whole": (grouped("llama"), {}),
        "lp": (grouped("llama", mode="lp"), plain),
        "bypass": (grouped("llama", bypass=1), plain),
        "heads": (grouped("llama", num_key_value_heads=1), plain),
        "float": (torch_cpullm.restore(grouped("llama")), plain),
    }
    found = {}
    for name, (model, options) in cases.items():
        try:
            distributed.shard_groups(model, **options)
        except ValueError as error:
            found[name] = str(error)
    return found


REFUSED = {
    "three": "tp_size must be a number of ranks that divides all 4, got 3",
    "none": "divides all 4, got 0",
    "text": "divides all 4, got '2'",
    "members": "layers 2 to 4 are 3 members, which 2 teams of 2 ranks do not divide",
    "whole": "layers 2 to 3 are 2 members, which 4 ranks do not divide; tp_size=2 cuts each member among 2",
    "lp": "only groups of mode 'cqil' with bypass 0 spread over ranks: layers 2 to 3 have mode 'lp'",
    "bypass": "layers 2 to 3 have mode 'cqil', bypass 1",
    "heads": "cannot be cut among 2 ranks: its 8 heads, 1 of keys and values, do not divide",
    "float": "the model has no packed decoder layers to cut",
}


def test_what_teams_cannot_share_is_refused_on_every_rank(tmp_path):
    for found in run(refused, tmp_path, world=4):
        assert found.keys() == REFUSED.keys(), found
        for name, text in REFUSED.items():
            assert text in found[name], name


# ---- ranks that do not answer ---------------------------------------------------------------------------------------


def interrupted(rank, folder):
    """Generate until rank 3 is killed between two operators of the third pass."""
    model = spread(grouped("llama"), timeout_s=2, transport=MEMORY)
    passes = []

    def third(*_):
        passes.append(1)
        if len(passes) == 3 and rank == 3:
            (folder / "at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    next(decoders(model)).layers[0].register_forward_hook(third)
    model.generate(IDS, max_new_tokens=8, do_sample=False)


def test_a_rank_that_is_lost_ends_both_teams(tmp_path):
    found = run(interrupted, tmp_path / "ranks", tmp_path, world=4)
    lost_at = float((tmp_path / "at").read_text())
    for rank, each in enumerate(found[:3]):
        assert f"LostRankError: rank {rank} of 4: another rank has ended" in each["error"]
        assert each["at"] - lost_at < 10
    assert found[3] == {"died": -signal.SIGKILL}
