"""optimize on unusual modules: each is converted rightly, or left as it is with a reason; then the report."""

import copy
import types
import warnings

import pytest
import torch
from cases import FLOATS
from torch import nn

import torch_cpullm
from torch_cpullm.config import Settings
from torch_cpullm.linear import PackedEmbedding, PackedLinear
from torch_cpullm.packing import dequantize

EXACT = Settings(compute="fp32")


def grid(rows=5, k=64, scale=1.0):
    return torch.linspace(-scale, scale, rows * k).view(rows, k)


def on_the_grid(model):
    """Make every matrix of ``model`` survive quantisation unchanged: eighths from -1 to 7/8, each group with a -1."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.dim() == 2:
                generator = torch.Generator().manual_seed(index)
                values = torch.randint(-8, 8, parameter.shape, generator=generator).float()
                values[:, ::16] = -8
                parameter.copy_(values / 8)
    return model


def check_same_function(model, *inputs):
    """optimize changes no result beyond rounding, on weights that 4 bits hold exactly."""
    model = on_the_grid(model).eval()
    with torch.no_grad():
        want = model(*inputs)
        torch_cpullm.optimize(model, Settings(compute="fp32", sym=True))
        got = model(*inputs)
        again = torch_cpullm.restore(model)(*inputs)
    for y in (got, again):
        assert y.shape == want.shape
        assert torch.allclose(y, want, rtol=1e-5, atol=1e-5 * float(want.abs().max())), float((y - want).abs().max())


def check_left_alone(module, reason, *inputs):
    """``module`` stays the same object with the same results, and the report says why."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Identity())
    model[1].inner = module
    before = None if not inputs else module(*inputs)
    torch_cpullm.optimize(model)
    assert type(model[0]) is PackedLinear
    assert model[1].inner is module
    if inputs:
        assert torch.equal(module(*inputs), before)
    rows = {row.name: row for row in torch_cpullm.report(model).rows}
    names = [name for name in rows if name.startswith("1.inner")]
    assert names, "a weight is missing from the report"
    assert {rows[name].state for name in names} == {"float"}
    assert any(reason in rows[name].reason for name in names), [rows[name].reason for name in names]
    torch_cpullm.restore(model)
    assert model[1].inner is module


# ---- linears --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 64), (33, 45), (64, 64), (96, 172)])
def test_linear_of_any_size(n, k, bias):
    check_same_function(nn.Sequential(nn.Linear(k, n, bias=bias)), grid(k=k))


def test_a_linear_that_is_the_whole_model():
    """There is no parent to put another module into: refused by name or converted in place, not broken."""
    model = nn.Linear(64, 64)
    weight, want = model.weight, model(grid())
    try:
        result = torch_cpullm.optimize(model)
    except (TypeError, ValueError) as error:
        assert "model" in str(error)  # noqa: PT017
        assert model.weight is weight
        assert torch.equal(model(grid()), want)
    else:
        assert result is model
        assert torch.allclose(model(grid()), want, atol=0.2)
        assert dict(model.named_children()) == {}


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Sequential(self.a, nn.Tanh())

    def forward(self, x):
        return self.b(self.a(x))


def test_one_module_in_two_places():
    """Weights shared by sharing the module, as ALBERT and T5 do."""
    check_same_function(Shared(), grid())
    model = torch_cpullm.optimize(Shared())
    assert model.a is model.b[0]
    torch_cpullm.restore(model)
    assert model.a is model.b[0]
    assert type(model.a) is nn.Linear


def test_one_weight_in_two_linears():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    check_same_function(copy.deepcopy(model), grid())
    torch_cpullm.optimize(model)
    assert model[0].packed is model[2].packed
    torch_cpullm.restore(model)
    assert model[0].weight is model[2].weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_other_float_types_stay(dtype):
    module = nn.Linear(64, 64)
    module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    check_left_alone(module, str(dtype).removeprefix("torch."))


def test_empty_weights_stay():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is nothing to initialise
        for module in (nn.Linear(0, 8), nn.Linear(8, 0)):
            check_left_alone(module, "empty")


def test_unaligned_and_strided_weights():
    """Checkpoints are mapped at 8-byte steps; a transposed or sliced weight is no reason to stumble."""
    base = nn.Linear(64, 96).weight.detach()
    want = torch_cpullm.optimize(nn.Sequential(_linear_of(base)))[0].packed.codes
    raw = torch.empty(base.numel() + 2)[2:].view(96, 64)
    wide = torch.empty(96, 70)
    for view in (raw.copy_(base), base.T.contiguous().T, wide[:, 3:67].copy_(base)):
        assert torch.equal(torch_cpullm.optimize(nn.Sequential(_linear_of(view)))[0].packed.codes, want)


def _linear_of(weight):
    module = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    module.weight = nn.Parameter(weight)
    module.bias = None
    return module


# ---- modules that are linears and more ------------------------------------------------------------------------------


class Renamed(nn.Linear):
    """As transformers' models have them: another name, the same function."""


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class ALittleMore(nn.Linear):
    def forward(self, x):
        return 1.01 * super().forward(x)


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-4, 4)


class OfClippedInput(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-2, 2))


class WithArgument(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class OfFourDimensions(nn.Linear):
    def forward(self, x):
        b, s, h, d = x.shape
        return super().forward(x.reshape(b, s, h * d))


class WithAdapter(nn.Linear):
    def __init__(self, k, n):
        super().__init__(k, n)
        self.down = nn.Linear(k, 4, bias=False)
        self.up = nn.Linear(4, n, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def test_subclass_with_the_same_function_is_converted():
    model = nn.Sequential(Renamed(64, 64))
    check_same_function(model, grid())
    assert type(model[0]) is Renamed
    assert type(torch_cpullm.optimize(model)[0]) is PackedLinear


@pytest.mark.parametrize("kind", [Doubled, ALittleMore, Clipped, OfClippedInput, Pair, WithArgument, OfFourDimensions])
def test_subclass_with_another_function_stays(kind):
    module = on_the_grid(kind(64, 64))
    check_left_alone(module, kind.__name__)


def test_subclass_with_linears_inside():
    """The subclass stays; nothing of what it computes is lost."""
    check_same_function(nn.Sequential(WithAdapter(64, 64)), grid())


def test_forward_replaced_on_the_instance():
    """accelerate and many patches set ``module.forward``: such a module is no plain linear."""
    module = nn.Linear(64, 64)
    module.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight) * 3, module)
    check_left_alone(module, "", grid())


@pytest.mark.parametrize("hook", ["forward", "forward_pre"])
def test_hooks_still_run(hook):
    """A hook on a linear either moves to the packed module or keeps the module in float; it is not dropped."""
    model, seen = nn.Sequential(nn.Linear(64, 64)), []
    getattr(model[0], f"register_{hook}_hook")(lambda *_: seen.append(hook))
    torch_cpullm.optimize(model)
    model(grid())
    assert seen == [hook]
    torch_cpullm.restore(model)
    model(grid())
    assert seen == [hook, hook]


def test_parametrised_weight_stays():
    module = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    check_left_alone(module, "parametrised", grid())


def test_weight_computed_by_a_hook():
    """The older weight and spectral norm keep ``weight`` as a plain tensor that a hook computes before every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are deprecated in favour of parametrisations, and in use
        for norm in (nn.utils.weight_norm, nn.utils.spectral_norm):
            model = nn.Sequential(norm(nn.Linear(64, 64))).eval()
            want = model(grid())
            torch_cpullm.optimize(model)
            assert torch.allclose(model(grid()), want, atol=0.2)
            torch_cpullm.restore(model)
            assert torch.allclose(model(grid()), want, atol=0.2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.out = nn.Linear(64, 64)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def test_multihead_attention():
    """It reads ``out_proj.weight`` itself, without calling out_proj."""
    check_same_function(Attention(), grid()[None])


def test_transformer_encoder_layer():
    """In eval mode it hands its linears' weights to one fused kernel."""
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    check_same_function(nn.Sequential(layer), grid()[None])


# ---- Conv1D, embeddings ---------------------------------------------------------------------------------------------


def test_conv1d_of_gpt2():
    """Its weight is [in, out]: packed as [out, in], and [in, out] again after restore."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=80, n_positions=32, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    model, ids = GPT2LMHeadModel(config).eval(), torch.tensor([[5, 6, 7, 8]])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    assert len(names) == 8
    torch_cpullm.optimize(model, EXACT)
    for name in names:
        assert type(model.get_submodule(name)) is PackedLinear
    fc = model.transformer.h[0].mlp.c_fc
    assert (fc.in_features, fc.out_features, fc.packed.n, fc.packed.k) == (48, 192, 192, 48)
    assert model.lm_head.packed is model.transformer.wte.packed
    with torch.no_grad():
        got = model(ids).logits
        want = torch_cpullm.restore(model)(ids).logits
    assert float((got - want).abs().max()) <= 1e-3 * float(want.abs().max())
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, Conv1D)
        assert module.weight.is_contiguous()
    report = torch_cpullm.report(torch_cpullm.optimize(model))
    assert {row.name: row.reason for row in report.rows if row.state == "float"} == {
        "transformer.wpe": "lookup table, not the model's input embedding"
    }


class Embedded(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embed, self.out = embedding, nn.Linear(64, 64)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        return self.out(self.embed(ids))


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: rows times a constant kept in the weight's type."""

    factor = 64**0.5

    def forward(self, ids):
        return super().forward(ids) * torch.tensor(self.factor).to(self.weight.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("factor", [8.0, 45.25, 0.7])
@pytest.mark.parametrize("seed", [0, 5, 7])
def test_embedding_that_scales_its_rows(seed, factor, dtype):
    """The packed rows are scaled by that very constant, not by one estimated from rounded numbers."""
    torch.manual_seed(seed)
    embedding = ScaledEmbedding(50, 64, padding_idx=seed or None)  # beyond the rows that are tried out
    embedding.factor = factor
    model = torch_cpullm.optimize(Embedded(embedding).to(dtype))
    assert type(model.embed) is PackedEmbedding
    ids = torch.arange(50)
    rows = dequantize(model.embed.packed).to(dtype)
    want = rows * torch.tensor(factor).to(dtype)
    assert torch.equal(model.embed(ids), want)
    torch_cpullm.restore(model)
    assert type(model.embed) is ScaledEmbedding
    assert torch.equal(model.embed(ids), want)


class ShiftedEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


class CappedEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids).clamp(-1, 1)


class BlankingEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * (ids != self.padding_idx).unsqueeze(-1)


@pytest.mark.parametrize(
    "embedding",
    [
        ShiftedEmbedding(50, 64),
        CappedEmbedding(50, 64),
        BlankingEmbedding(50, 64, padding_idx=9),
        nn.Embedding(50, 64, max_norm=1.0),
    ],
    ids=["shifted", "capped", "blanking", "max_norm"],
)
def test_embedding_with_another_function_stays(embedding):
    model = Embedded(embedding)
    torch_cpullm.optimize(model)
    assert model.embed is embedding
    assert type(model.out) is PackedLinear


def test_embeddings_that_are_not_the_input_embedding_stay():
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64))
    torch_cpullm.optimize(model, strict=True)
    assert type(model[0]) is nn.Embedding
    assert [row.kind for row in torch_cpullm.report(model).rows] == ["embedding", "linear"]


# ---- what optimised models refuse -----------------------------------------------------------------------------------


def test_moving_an_optimised_model_changes_nothing():
    """The whole model stays usable: no part of it has gone to the other device when the error comes."""
    model = torch_cpullm.optimize(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.LayerNorm(64)))
    with torch.no_grad():
        want = model(grid())
        with pytest.raises(RuntimeError, match=r"stays on the CPU; it cannot be moved to meta"):
            model.to("meta")
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert torch.equal(model(grid()), want)


def test_training_an_optimised_model():
    model = torch_cpullm.optimize(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)))
    with pytest.raises(RuntimeError, match="no gradient"):
        model.train()(grid().requires_grad_())


# ---- report ---------------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleList(nn.Linear(64, 64) for _ in range(3)), Doubled(64, 32), nn.Conv1d(4, 4, 3))
    model.table = nn.Embedding(10, 64)
    return model


def test_report_of_an_optimised_model(isa):
    model = torch_cpullm.optimize(small(), Settings(group_size=64, sym=True))
    report = torch_cpullm.report(model)
    assert report.isa == isa
    assert isinstance(report, torch_cpullm.Report)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["0.0", "0.1", "0.2", "1", "2", "table"]
    for name in ("0.0", "0.1", "0.2"):
        row = rows[name]
        assert (row.kind, row.state, row.reason) == ("linear", "int4", "")
        assert (row.bits, row.group_size, row.compute) == (4, 64, "int8")
        assert (row.bytes_before, row.bytes_after) == (64 * 64 * 4, 64 * 64 // 2 + 64 * 2)
    assert rows["1"].state == "float"
    assert "Doubled" in rows["1"].reason
    assert (rows["1"].bytes_before, rows["1"].bytes_after) == (64 * 32 * 4, 64 * 32 * 4)
    assert "3-D" in rows["2"].reason
    assert "lookup table" in rows["table"].reason
    assert {row.name for row in report.left_in_float} == {"1", "2"}
    assert report.bytes_before == 4 * (3 * 64 * 64 + 64 * 32 + 4 * 4 * 3 + 10 * 64)
    assert report.bytes_after == report.bytes_before - 3 * (64 * 64 * 4 - 64 * 64 // 2 - 128)


def test_report_as_a_table():
    text = str(torch_cpullm.report(torch_cpullm.optimize(small())))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "count", "state", "group", "compute", "MB", "before", "MB", "after"]
    merged = [line for line in lines if line.startswith("0.*")]
    assert len(merged) == 1, "layers alike share a line"
    assert merged[0].split()[1:5] == ["3", "int4", "32", "int8"]
    assert any("Doubled does not compute what nn.Linear does" in line for line in lines)
    assert lines[-1].startswith("3 of 6 modules quantised, ")
    assert f"kernels: {torch_cpullm.report(small()).isa}" in lines[-1]
    assert max(map(len, lines)) <= 120


def test_report_counts_a_shared_weight_once():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    before = torch_cpullm.report(model)
    assert before.bytes_before == before.bytes_after == 64 * 64 * 4
    after = torch_cpullm.report(torch_cpullm.optimize(model))
    assert after.bytes_before == 64 * 64 * 4
    assert after.bytes_after == model[0].packed.nbytes
    assert "shares its packed weight" in after.rows[1].reason


def test_report_of_a_model_that_is_not_optimised():
    report = torch_cpullm.report(small())
    assert {row.state for row in report.rows} == {"float"}
    assert report.bytes_before == report.bytes_after
    first = report.rows[0]
    assert (first.name, first.kind) == ("0.0", "linear")
    assert "not a linear" not in first.reason
    assert str(report).splitlines()[-1].startswith("0 of 6 modules quantised")
    assert torch_cpullm.report(nn.ReLU()).rows == []
