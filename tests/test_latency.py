"""The latency model: bytes as packed, the equation, the counts of every split, and ``cpullm plan``."""

import json

import pytest
import torch
from layer_models import ALL
from small_models import llama

import torch_cpullm
from torch_cpullm import cli, cqil, latency, latency_constants
from torch_cpullm.checkpoint import Form
from torch_cpullm.config import Settings
from torch_cpullm.latency import FLOAT, Constants, Footprint, Kind
from torch_cpullm.packing import pack
from torch_cpullm.quant import quantize_rtn

INT4 = Kind(Form(4, 32, "point", "float16"), "int8")
# 8 layers of 1 MB at 1 GB/s: 1 ms each; the head 2 ms. The other constants are told apart by their size.
EIGHT = Footprint(({INT4: 1e6},) * 8, {FLOAT: 4e6}, 64)
CONSTANTS = Constants({INT4: 1.0, FLOAT: 2.0}, 5e-6, 3e-4, 1e-6, 5, 1e-5, 1e-4, 2)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (4, -1), (8, 32)])
@pytest.mark.parametrize(("n", "k"), [(32, 32), (33, 70), (64, 160)])
def test_bytes_are_those_of_packed_weights(n, k, bits, group, sym):
    weight = pack(quantize_rtn(torch.randn(n, k), bits, group, sym or bits == 8, torch.float16))
    assert latency.packed_bytes(n, k, Form.of(weight)) == weight.nbytes


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gpt2"])
@pytest.mark.parametrize("settings", [Settings(), Settings(group_size=64, sym=True, compute="fp32")])
def test_a_float_model_is_counted_as_it_would_be_packed(name, settings):
    model = ALL[name].build()
    before = latency.footprint(model, settings)
    after = latency.footprint(torch_cpullm.optimize(model, settings))
    assert before == after
    assert len(after.layers) == model.config.num_hidden_layers
    packed = sum(m.packed.nbytes for m in model.modules() if type(m).__name__ == "PackedLinear")
    counted = sum(size for each in (*after.layers, after.rest) for kind, size in each.items() if kind != FLOAT)
    assert counted == packed, "the embedding is looked up, not read"


def test_a_saved_model_is_counted_as_it_was_packed(tmp_path):
    from torch_cpullm import runner

    model = torch_cpullm.optimize(llama(tied=False), torch_cpullm.CpuLlmConfig(group_size=64, sym=True))
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert latency.footprint(runner.load_meta(tmp_path)) == latency.footprint(model)


def test_of_experts_those_in_use_count():
    from families import FAMILIES

    family = next(family for family in FAMILIES if family.experts)
    one, all_ = (latency.footprint(_with_experts(family, used)) for used in (1, 4))
    inside = [sum(sum(layer.values()) for layer in each.layers) for each in (one, all_)]
    assert inside[1] > 2 * inside[0]


def _with_experts(family, used):
    model = family.build()
    model.config.num_experts_per_tok = used
    return model


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="one stack of decoder layers, Linear has 0"):
        latency.footprint(torch.nn.Linear(32, 32))


# ---- the equation ---------------------------------------------------------------------------------------------------


def test_seconds_are_the_equation():
    alone = latency.seconds(latency.one_process(EIGHT), CONSTANTS)
    assert alone == pytest.approx(8e-3 + 2e-3 + 8 * 5e-6 + 3e-4)
    two = latency.seconds(latency.tensor_parallel(EIGHT, 2), CONSTANTS)
    assert two == pytest.approx(4e-3 + 2e-3 + 8 * 5e-6 + 3e-4 + 8 * 6 * 1e-5 + 16 * 1e-4)
    inside = latency.seconds(latency.tensor_parallel(EIGHT, 2, inside=True), CONSTANTS)
    assert inside == pytest.approx(4e-3 + 2e-3 + 8 * 5e-6 + 3e-4 + 16 * (1e-6 + 1e-4)), "a barrier per sum"
    four = latency.tensor_parallel(EIGHT, 4)
    assert latency.seconds(four, CONSTANTS) == pytest.approx(2e-3 + 2e-3 + 4e-5 + 3e-4 + 48e-5 + 16 * 2e-4)


def test_cqil_reads_a_share_of_the_groups_and_meets_once_per_group():
    pairs = [(2, 2), (4, 2)]
    work = latency.cqil_ranks(EIGHT, pairs, 2)
    assert (work.read[INT4], work.layers, work.all_reduces, work.operators) == (6e6, 6, 2, 6 + 2 * 4)
    assert latency.cqil_ranks(EIGHT, pairs, 2, inside=True).operators == 0, "one operator has all layers and sums"
    uneven = latency.cqil_ranks(EIGHT, [(1, 3)], 2)
    assert (uneven.read[INT4], uneven.layers, uneven.all_reduces) == (7e6, 7, 1)
    both = latency.cqil_of_tensor_parallel(EIGHT, pairs, 2, 2)
    assert (both.read[INT4], both.all_reduces, both.ranks) == (4e6 / 4 + 2e6 / 2, 2 * 4 + 2, 4)
    assert (both.team_sums, both.team) == (2, 2), "of attention: one per group, whose members are on a team each"
    assert latency.cqil_ranks(EIGHT, pairs, 1).read == latency.one_process(EIGHT).read


def test_the_default_window_is_the_published_one():
    assert latency.default_groups(32, 4) == ((14, 4), (18, 4), (22, 4), (26, 4))
    assert latency.default_groups(32, 2)[0] == (14, 2)
    assert latency.default_groups(32, 2)[-1] == (28, 2)
    assert latency.default_groups(2, 2) == ()


def test_predictions_by_sockets():
    one, two, four = latency.predict(EIGHT, CONSTANTS, [1, 2, 4])
    assert one["tensor parallel"] is None
    assert two["CQIL of TP groups"] is None, "two ranks are one pair, or one layer cut in two"
    assert two["CQIL"] == pytest.approx(latency.seconds(latency.cqil_ranks(EIGHT, [(4, 2)], 2), CONSTANTS))
    assert four["CQIL of TP groups"] < four["one process"]
    none = latency.predict(Footprint(EIGHT.layers[:2], {}, 64), CONSTANTS, [2])[0]
    assert none["CQIL"] is None, "two layers have no middle"


def test_measured_stacks_are_as_large_as_the_model_up_to_what_no_cache_holds(monkeypatch):
    sizes = []

    def layer_time(sizes_, share, form, compute, size, meet, ranks=None):
        sizes.append(size)
        return latency_constants.LayerTime(1e-3, 1000), None

    monkeypatch.setattr(latency, "layer_time", layer_time)
    monkeypatch.setattr(latency, "memory_gbps", lambda size, meet: 1.0)
    monkeypatch.setattr(latency, "token_cost", lambda *_: 1e-3)
    monkeypatch.setattr(latency, "barrier_cost", lambda: latency_constants.Barriers(1e-6, 6, 1e-5))
    monkeypatch.setattr(latency, "dispatch_cost", lambda: 1e-5)
    for layer, cache, asked, size in (
        (10e6, 1 << 20, None, 80_000_000),
        (10e6, 1 << 20, 30e6, 30_000_000),
        (1e9, 1 << 20, None, 256 << 20),
        (1e9, 320 << 20, None, 1280 << 20),
    ):
        monkeypatch.setattr(latency, "cache_bytes", lambda cache=cache: cache)
        latency.measure(Footprint(({INT4: layer},) * 8, {}, 64), read_bytes=asked)
        assert sizes == [size, size]
        sizes.clear()


def test_constants_are_measured():
    torch.set_num_threads(1)
    of = latency.footprint(llama())
    found = latency.measure(of, read_bytes=1 << 22)
    assert all(value > 0 for value in found.gbps.values())
    assert found.barrier_s == pytest.approx(0, abs=2e-6), "one thread waits for nobody"
    assert 3 <= found.barriers <= 10
    assert 0 < found.dispatch_s < 1e-2
    assert found.dispatch_s < found.token_s < 1
    assert 0 <= found.steps_s < 1e-2
    assert (found.all_reduce_s, found.transport) == (latency.ALL_REDUCE_S, "")
    assert latency.measure(of, (1.0, "gloo"), read_bytes=1 << 22).transport == "gloo"


@pytest.mark.parametrize("share", [1, 2, 8])
def test_layers_that_are_measured_have_the_bytes_of_the_model(share):
    for name in ("tinyllama-1.1b", "llama-2-7b", "smollm2"):
        hidden, heads, kv_heads, inner = {
            "tinyllama-1.1b": (2048, 32, 4, 5632),
            "llama-2-7b": (4096, 32, 32, 11008),
            "smollm2": (576, 9, 3, 1536),
        }[name]
        d, form = hidden // heads, INT4.form
        shapes = [(hidden, hidden)] * 2 + [(kv_heads * d, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
        sizes = latency.Sizes(hidden, heads, kv_heads, d, sum(latency.packed_bytes(n, k, form) for n, k in shapes))
        made = latency_constants.layer_spec(sizes, share, form, "int8")
        own = sum(linear.packed.nbytes for linear in made.linears())
        assert own == pytest.approx(sizes.bytes / share, rel=0.03 if share < 8 else 0.2), name


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys, monkeypatch):
    from torch_cpullm import launch

    monkeypatch.setattr(launch, "_applied", None)
    monkeypatch.setattr(latency, "READ_BYTES", 1 << 22)

    def run(*arguments):
        code = cli.main(["plan", *map(str, arguments), "--threads", "1"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A config without any weights."""
    path = tmp_path_factory.mktemp("llama")
    ALL["llama"].build().config.save_pretrained(path)
    return path


def test_plan_prints_predictions_and_says_so(call, directory):
    code, out, _ = call(directory, "--sockets", "1,2,64")
    assert code == 0
    assert out.startswith("Prediction, not a measurement")
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["1", "2", "64"]
    assert max(map(len, out.splitlines())) <= 100


def test_plan_as_json_with_a_plan_of_groups(call, directory, tmp_path):
    file = tmp_path / "plan.json"
    config = ALL["llama"].build().config
    layers, hidden = config.num_hidden_layers, config.hidden_size
    file.write_text(cqil.Plan(((0, 2),), "llama", layers, hidden).to_json())
    code, out, _ = call(directory, "--plan", file, "--json", "--sockets", "2", "--group-size", "64")
    found = json.loads(out)
    assert code == 0
    assert found["prediction"][0]["CQIL"] > 0
    assert any("g64" in name for name in found["constants"]["gbps"])
    for text, want in (
        (cqil.Plan(((0, 2),), "llama", layers + 1, hidden).to_json(), "another model"),
        (cqil.Plan(((0, 2),), "llama", layers, hidden, bypass=1).to_json(), "only mode 'cqil' with bypass 0"),
        ("{}", "a CQIL plan has the fields"),
        ("{", "--plan"),
    ):
        file.write_text(text)
        code, _, err = call(directory, "--plan", file)
        assert code == 2
        assert want in err
    code, _, err = call(directory, "--plan", tmp_path / "none.json")
    assert (code, "No such file" in err) == (2, True)


def test_plan_refuses_what_is_wrong(call, directory, tmp_path):
    for sockets in ("0", "2,x", "", "-1", "9999"):
        code, _, err = call(directory, f"--sockets={sockets}")
        assert code == 2
        assert "--sockets must be numbers" in err
    code, _, err = call(tmp_path)
    assert code == 2
    assert "MODEL" in err
    for kind, text in (("mamba", "one stack of decoder layers"), ("none", "cannot load")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        code, _, err = call(tmp_path)
        assert code == 2
        assert text in err
