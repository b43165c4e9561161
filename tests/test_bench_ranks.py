"""What bench_ranks measures, on a tiny shape: shares of random codes, and the constants of all ranks at once."""

import pytest
import torch.distributed as dist
from ranks import run
from test_distributed_tensors import IDS, _bytes

import torch_cpullm
from benchmarks import bench_ranks, shapes
from torch_cpullm import cqil, distributed, latency
from torch_cpullm.share import Share

TINY = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 512,
}


def shared(rank):
    shapes.SHAPES["tiny"] = TINY
    settings = torch_cpullm.CpuLlmConfig(sym=True)
    one = shapes.packed_model("tiny", settings)
    mine = shapes.packed_model("tiny", settings, Share(rank, 2), transport="shared memory")
    of, before = latency.footprint(one), distributed.traffic(mine)
    options = {"share": 2, "ranks": distributed.ranks_of(mine), "meet": dist.barrier, "read_bytes": 1 << 20}
    constants = latency.measure(of, (1e-9, "shared memory"), **options)
    work = latency.tensor_parallel(of, 2, inside=True)
    return {
        "bytes": [_bytes(mine), _bytes(one)],
        "finite": bool(mine(IDS % 96).logits.isfinite().all()),
        "traffic": distributed.traffic(mine)[0] - before[0],
        "net": constants.all_reduce_s,
        "predicted": latency.seconds(work, constants),
        "on meta": latency.footprint(bench_ranks.on_meta("tiny"), settings) == of,
    }


def test_shares_and_constants_of_ranks(tmp_path):
    found = run(shared, tmp_path)
    for each in found:
        assert "error" not in each, each
        assert each["finite"]
        assert each["on meta"]
        assert each["traffic"] == 4, "of the one call: measuring is not counted"
        assert each["net"] >= 1e-9
        assert 0 < each["predicted"] < 1
    assert sum(each["bytes"][0] for each in found) == found[0]["bytes"][1]


def teams(rank):
    """The same of CQIL members that are cut among pairs of ranks."""
    shapes.SHAPES["tiny"] = {**TINY, "num_hidden_layers": 8}
    model = shapes.packed_model("tiny", torch_cpullm.CpuLlmConfig(sym=True))
    of, groups = latency.footprint(model), latency.default_groups(8, 2)
    cqil.apply(model, cqil.Plan.of(model, groups))
    distributed.shard_groups(model, tp_size=2, transport="shared memory")
    before = distributed.traffic(model)[0]
    options = {"share": 4, "ranks": distributed.ranks_of(model), "meet": dist.barrier, "read_bytes": 1 << 20}
    constants = latency.measure(of, (1e-9, "shared memory"), **options)
    work = latency.cqil_of_tensor_parallel(of, groups, 2, 2, inside=True)
    assert distributed.traffic(model)[0] == before, "measuring is not counted"
    model(IDS % 96)
    return {
        "sums": [distributed.traffic(model)[0] - before, work.all_reduces + work.team_sums],
        "team": constants.team_sum_s,
        "predicted": latency.seconds(work, constants),
    }


def test_teams_are_predicted_with_the_sums_that_they_make(tmp_path):
    for each in run(teams, tmp_path, world=4):
        assert "error" not in each, each
        assert each["sums"] == [14, 14]
        assert each["team"] >= 0
        assert 0 < each["predicted"] < 1


def test_the_command_refuses_a_split_that_is_none():
    for split in ("2", "1x4", "x", "2x0"):
        with pytest.raises(SystemExit):
            bench_ranks.main(["--splits", split])
    with pytest.raises(SystemExit, match="2x2 is a layout of 4 ranks, not of 2"):
        bench_ranks.main(["--splits", "2x1", "--ways", "2x2"])
