"""Ranks that load only their share of a checkpoint, by transformers' own argument, and what cannot be cut."""

import shutil
import time
from itertools import pairwise

import pytest
import torch
from families import LLAMA_LIKE, Family
from layer_models import ALL
from ranks import run
from safetensors.torch import load_file, save_file
from test_distributed_tensors import FAMILIES, IDS, SIZES, _bytes, built

import torch_cpullm
from torch_cpullm import cqil, distributed
from torch_cpullm.packing import pack, unpack
from torch_cpullm.plan import Target
from torch_cpullm.quant import quantize_rtn
from torch_cpullm.share import Cut, Linear, Share, cut_layer

FP32 = {"compute": "fp32"}


def floats(name, **options):
    config, own = FAMILIES[name]
    return Family(name, config, {**LLAMA_LIKE, **SIZES, **own, **options}).build()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Float and saved checkpoints of some families."""
    path = tmp_path_factory.mktemp("checkpoints")
    for name in ("llama", "qwen3", "opt"):
        floats(name).save_pretrained(path / name)
        built(name, "fp32").save_pretrained(path / f"{name}-saved")
    floats("llama", attention_bias=False, mlp_bias=False).save_pretrained(path / "plain")
    ALL["phi3"].build().save_pretrained(path / "fused")
    floats("llama", num_key_value_heads=1).save_pretrained(path / "heads")
    grouped = floats("llama")
    cqil.apply(grouped, cqil.Plan.of(grouped, [(0, 2)])).save_pretrained(path / "grouped")
    return path


def asked(**sizes):
    from transformers.distributed import DistributedConfig

    return DistributedConfig(**{"tp_size": 2, **sizes})


def from_pretrained(path, **options):
    from transformers import AutoModelForCausalLM

    settings = {} if path.name.endswith("-saved") else {"quantization_config": torch_cpullm.CpuLlmConfig(**FP32)}
    return AutoModelForCausalLM.from_pretrained(path, **settings, **options)


def share(rank, path):
    one, mine = from_pretrained(path), from_pretrained(path, distributed_config=asked())
    before = distributed.traffic(mine)
    want, got = one(IDS).logits, mine(IDS).logits
    tokens = [model.generate(IDS, max_new_tokens=6, do_sample=False).tolist() for model in (one, mine)]
    found = {"difference": float((got - want).abs().max() / want.abs().max()), "tokens": tokens}
    found |= {"bytes": [_bytes(mine), _bytes(one)], "report": str(torch_cpullm.report(mine))}
    found["sums"] = distributed.traffic(mine)[0] - before[0] > 0
    try:
        mine.save_pretrained("nowhere")
    except RuntimeError as error:
        found["save"] = str(error)
    by_load, _ = torch_cpullm.load(path, distributed_config=asked(), **({} if "-saved" in path.name else _config()))
    found["load"] = float((by_load(IDS).logits - got).abs().max())
    return found


def _config():
    return {"config": torch_cpullm.CpuLlmConfig(**FP32)}


@pytest.mark.parametrize("name", ["llama", "llama-saved", "plain", "qwen3-saved", "opt"])
def test_shares_equal_one_process(name, folder, tmp_path):
    found = run(share, tmp_path, folder / name)
    for each in found:
        assert "error" not in each, each
        assert each["difference"] < 1e-4
        assert each["tokens"][0] == each["tokens"][1]
        assert each["sums"]
        assert "2 of 2 as one op" in each["report"] or "2 of 2 as two ops" in each["report"]
        assert each["save"].startswith("a sharded model holds only this rank's share")
        assert each["load"] < 1e-4
    assert sum(each["bytes"][0] for each in found) == found[0]["bytes"][1], "every weight is on one rank"


def refused(_, folder):
    cases = {
        "fused": lambda: from_pretrained(folder / "fused", distributed_config=asked()),
        "heads": lambda: from_pretrained(folder / "heads", distributed_config=asked()),
        "grouped": lambda: from_pretrained(folder / "grouped", distributed_config=asked()),
        "rules": lambda: from_pretrained(folder / "llama", distributed_config=asked(tp_plan={"lm_head": "colwise"})),
        "pipeline": lambda: from_pretrained(folder / "llama", distributed_config=asked(tp_size=1, pp_size=2)),
    }
    found = {}
    for name, load in cases.items():
        try:
            load()
        except ValueError as error:
            found[name] = str(error)
    return found


REFUSED = {
    "fused": "model.layers.0 cannot be cut among 2 ranks: its linears are fused",
    "heads": "model.layers.0 cannot be cut among 2 ranks: its 8 heads, 1 of keys and values, do not divide",
    "grouped": "a model with a CQIL plan is not cut while it loads",
    "rules": "tp_plan must be None or 'auto', not rules",
    "pipeline": "packed weights are only cut for tensor parallel: pp_size must be 1",
}


def test_what_cannot_be_loaded_in_shares_is_refused(folder, tmp_path):
    for found in run(refused, tmp_path, folder):
        assert found.keys() == REFUSED.keys(), found
        for name, text in REFUSED.items():
            assert text in found[name], name


# ---- a rank that fails ----------------------------------------------------------------------------------------------


def failing(rank, folder, how):
    """Load shares, of which rank 1 finds a damaged checkpoint, or none."""
    path = folder / "llama-saved"
    load = from_pretrained if how == "ends" else torch_cpullm.load
    if rank == 1 and how == "damaged":
        path, load = folder / "damaged-saved", from_pretrained
    elif rank == 1:
        path = folder / "nowhere-saved"
    start = time.monotonic()
    try:
        load(path, distributed_config=asked())
    except (OSError, RuntimeError, ValueError) as error:
        if rank == 1 and how != "ends":
            time.sleep(1)  # the others do not learn it from its end
        return {"text": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - start}


@pytest.mark.parametrize("how", ["damaged", "missing", "ends"])
def test_a_rank_whose_load_fails_ends_the_others(how, folder, tmp_path):
    damaged = tmp_path / "damaged-saved"
    shutil.copytree(folder / "llama-saved", tmp_path / "llama-saved")
    shutil.copytree(folder / "llama-saved", damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scales"][0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    found = run(failing, tmp_path / "ranks", tmp_path, how)
    assert max(each["seconds"] for each in found) < 10
    own, other = found[1]["text"], found[0]["text"]
    assert ("damaged" if how == "damaged" else "nowhere") in own, own
    if how == "ends":  # in transformers' own code, which tells nobody: the end of its process does
        assert "LostRankError: another rank has ended" in other, other
    else:
        assert "rank 1 of 2 could not load the model: " + own[:60] in other, other


def test_a_process_that_is_alone_gets_no_share(folder):
    """The setting may come with a config, which transformers then does not look at."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder / "llama")
    config.distributed_config = asked()
    with pytest.raises(ValueError, match=r"asks for 2 ranks, and torch\.distributed is not initialised"):
        from_pretrained(folder / "llama", config=config)


# ---- cuts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_a_part_of_a_packed_weight_is_the_packed_part(sym, group):
    weight = torch.randn(70, 300)
    whole = pack(quantize_rtn(weight, 4, group, sym, torch.float16))
    for cut in (
        Cut(rows=slice(10, 45)),
        Cut(inputs=slice(128, 256), group=group),
        Cut(inputs=slice(256, 300), group=group),
    ):
        part = unpack(cut.of(whole))
        want = quantize_rtn(weight[cut.rows, cut.inputs].contiguous(), 4, group, sym, torch.float16)
        assert torch.equal(part.codes, want.codes)
        assert torch.equal(part.scales, want.scales)
        assert sym or torch.equal(part.zeros, want.zeros)


def test_cuts_of_a_layer_cover_it():
    o, down = Linear(64, 128, 32), Linear(64, 300, 32)
    linears = {"q": Linear(128, 64, 32), "k": Linear(64, 64, 32), "v": Linear(64, 64, 32), "o": o, "down": down}
    linears |= {"gate": Linear(300, 64, 32), "up": Linear(300, 64, 32)}
    cuts = [cut_layer(linears, 4, 4, Share(rank, 4)) for rank in range(4)]
    for role, linear in linears.items():
        own = [cut[role].inputs if role in ("o", "down") else cut[role].rows for cut in cuts]
        assert own[0].start == 0
        assert all(a.stop == b.start for a, b in pairwise(own))
        assert own[-1].stop == (linear.inputs if role in ("o", "down") else linear.outputs)
    bias = torch.ones(64)
    assert [cut["o"].bias(bias) is None for cut in cuts] == [False, True, True, True], "added to a sum once"
    with pytest.raises(ValueError, match="in groups of 128, do not divide"):
        cut_layer({**linears, "o": Linear(64, 128, 128)}, 4, 4, Share(0, 4))


def test_inputs_in_another_order_are_not_cut():
    target = Target(["q_proj"], torch.nn.Linear(64, 64), "linear", cut=Cut(rows=slice(0, 32)))
    packed = pack(quantize_rtn(torch.randn(32, 64), 4, 32, True, torch.float16))
    assert target.replacement([packed], torch.float32, "int8").bias.shape == (32,)
    with pytest.raises(ValueError, match=r"q_proj has its inputs in another order \(desc_act\), and cannot be cut"):
        target.replacement([packed], torch.float32, "int8", torch.arange(64, dtype=torch.int32))
