"""PackedLinear and PackedEmbedding as nn.Modules: casts, moves, copies, saving, training, compiling."""

import copy
import io
import pickle

import pytest
import torch
from cases import FLOATS, activations, quantized
from torch import nn

from torch_cpullm import ops
from torch_cpullm.linear import PackedEmbedding, PackedLinear, gather
from torch_cpullm.packing import dequantize, pack, unpack

FORMS = [("sym", 4), ("zero", 4), ("minimum", 4), ("sym", 8)]


def a_linear(form="zero", bits=4, n=45, k=172, group=64, bias=True, dtype=torch.float32, seed=0, **options):
    packed = pack(quantized(n, k, group, form, bits, seed=seed))
    return PackedLinear(packed, activations(1, n)[0].to(dtype) if bias else None, dtype=dtype, **options)


def an_embedding(n=45, k=172, dtype=torch.float32, **options):
    return PackedEmbedding(pack(quantized(n, k, 32, bits=8)), dtype=dtype, **options)


# ---- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["int8", "fp32"])
@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_forward_is_the_operator(form, bits, compute, isa):
    for dtype in FLOATS:
        module, x = a_linear(form, bits, dtype=dtype, compute=compute), activations(6, 172, dtype).view(2, 3, 172)
        want = ops.linear(x, module.packed, module.bias, compute=compute)
        assert torch.equal(module(x), want)
        assert want.dtype == dtype


def test_forward_is_near_the_dequantised_linear():
    module, x = a_linear(), activations(6, 172)
    want = nn.functional.linear(x, module.dequantize(), module.bias)
    assert torch.equal(module.dequantize(), dequantize(module.packed))
    size = want.abs().amax(1, keepdim=True)
    assert bool(((module(x) - want).abs() <= 0.02 * size).all())
    exact = a_linear(compute="fp32")
    assert bool(((exact(x) - want).abs() <= 1e-5 * size).all())


def test_embedding_forward_and_multiplier():
    ids = torch.tensor([[0, 44], [3, 3]])
    for dtype in FLOATS:
        module = an_embedding(dtype=dtype)
        rows = dequantize(module.packed)[ids].to(dtype)
        assert torch.equal(module(ids), rows)
        scaled = an_embedding(dtype=dtype, multiplier=24.0)
        assert torch.equal(scaled(ids), rows * 24.0)
        assert scaled(ids).dtype == dtype


# ---- what other code reads ------------------------------------------------------------------------------------------


def test_attributes_of_a_linear():
    module = a_linear()
    assert (module.in_features, module.out_features, module.compute) == (172, 45, "int8")
    assert module.bias.shape == (45,)
    assert a_linear(bias=False).bias is None
    weight = module.weight
    assert weight.shape == (45, 172)
    assert weight.dtype == torch.float32
    assert weight.device.type == "cpu"
    assert weight.untyped_storage().nbytes() <= 4, "the placeholder takes no memory"
    assert bool(weight.isnan().all()), "its values must not be mistaken for the weight's"
    assert type(weight + 1) is torch.Tensor
    with pytest.raises(RuntimeError, match="this weight is packed: it cannot be merged"):
        weight.data += 1
    assert isinstance(module, nn.Linear)
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    assert not module.bias.requires_grad
    assert a_linear(dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_attributes_of_an_embedding():
    module = an_embedding(padding_idx=3)
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (45, 172, 3)
    assert module.weight.shape == (45, 172)
    assert list(module.parameters()) == []


def test_repr_says_what_it_is():
    text = repr(a_linear())
    parts = ("PackedLinear", "in_features=172", "out_features=45", "bias=True", "bits=4", "group_size=64", "zero point")
    for part in (*parts, "float32", "int8"):
        assert part in text
    assert "symmetric" in repr(a_linear("sym"))
    assert "minimum" in repr(a_linear("minimum", compute="fp32"))
    assert "fp32" in repr(a_linear("minimum", compute="fp32"))
    assert "bits=8" in repr(an_embedding())
    assert "45, 172" in repr(an_embedding())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64])
def test_wrong_dtype(dtype):
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        PackedLinear(pack(quantized(32, 32, 32)), None, dtype=dtype)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        an_embedding(dtype=dtype)


def test_wrong_compute():
    with pytest.raises(ValueError, match="compute must be one of 'int8', 'fp32', 'bf16', got 'int4'"):
        a_linear(compute="int4")


@pytest.mark.parametrize("width", [1, 171, 173, 192, 193, 1000])
def test_input_of_the_wrong_width(width):
    """As nn.Linear, also where the packed form, whose width is a multiple of 32, could hold that many inputs."""
    with pytest.raises((RuntimeError, ValueError), match="linear"):
        a_linear()(torch.zeros(2, width))


# ---- casts and moves ------------------------------------------------------------------------------------------------


def packed_bytes(module):
    p = module.packed
    return [t.clone() for t in (p.codes, p.scales, p.zeros) if t is not None]


@pytest.mark.parametrize("cast", ["to", "half", "bfloat16", "to twice", "type", "to a tensor's"])
def test_casts_leave_packed_data_alone(cast):
    model = nn.Sequential(an_embedding(), nn.LayerNorm(172), a_linear(), nn.LayerNorm(45))
    before = [packed_bytes(m) for m in (model[0], model[2])]
    how = {
        "to": lambda: model.to(torch.bfloat16),
        "half": model.half,
        "bfloat16": model.bfloat16,
        "to twice": lambda: model.half().to(torch.bfloat16),
        "type": lambda: model.type(torch.bfloat16),
        "to a tensor's": lambda: model.to(torch.zeros((), dtype=torch.bfloat16)),
    }
    how[cast]()
    dtype = torch.float16 if cast == "half" else torch.bfloat16
    for want, module in zip(before, (model[0], model[2]), strict=True):
        after = packed_bytes(module)
        assert [t.dtype for t in after] == [t.dtype for t in want]
        assert all(torch.equal(a, b) for a, b in zip(after, want, strict=True))
        assert module.dtype == module.weight.dtype == dtype
    assert model[2].bias.dtype == dtype
    with torch.no_grad():
        out = model(torch.tensor([[0, 3, 44]]))
    assert out.dtype == dtype
    assert bool(torch.isfinite(out).all())


def test_cast_there_and_back_keeps_every_value():
    module, x = a_linear(bias=False), activations(3, 172)
    want = module(x)
    module.half().float()
    assert module.dtype == torch.float32
    assert torch.equal(module(x), want)


def test_cpu_and_memory_formats_are_no_moves():
    module, x = a_linear(), activations(3, 172)
    want = module(x)
    assert torch.equal(module.to("cpu").cpu().to(torch.device("cpu"))(x), want)
    assert torch.equal(module.to(memory_format=torch.channels_last)(x), want)
    assert torch.equal(module.requires_grad_(False).eval()(x), want)


@pytest.mark.parametrize("module", [a_linear(), an_embedding(), nn.Sequential(nn.Identity(), a_linear())])
@pytest.mark.parametrize("move", [lambda m: m.to("meta"), lambda m: m.to_empty(device="meta")])
def test_other_devices_are_refused(module, move):
    inner = module if not isinstance(module, nn.Sequential) else module[1]
    want = packed_bytes(inner)
    with pytest.raises(
        RuntimeError, match=r"torch_cpullm stays on the CPU; it cannot be moved to meta.*restore\(model\)"
    ):
        move(module)
    assert all(torch.equal(a, b) for a, b in zip(packed_bytes(inner), want, strict=True))
    assert inner.weight.device.type == "cpu"
    if isinstance(inner, PackedLinear):
        assert inner.bias.device.type == "cpu"


# ---- training -------------------------------------------------------------------------------------------------------


def test_training_is_refused():
    module = a_linear()
    x = activations(2, 172).requires_grad_()
    with pytest.raises(RuntimeError, match=r"inference.*no gradient.*restore\(model\)"):
        module(x)
    with torch.no_grad():
        assert torch.equal(module(x), module(x.detach()))
    with torch.inference_mode():
        assert torch.equal(module(x), module(x.detach()))


def test_forward_with_grad_mode_on_and_frozen_input():
    """Calling a model outside of no_grad is common; nothing requires a gradient, so it works and gives no graph."""
    y = a_linear()(activations(2, 172))
    assert not y.requires_grad
    assert not an_embedding()(torch.tensor([1])).requires_grad


# ---- copies ---------------------------------------------------------------------------------------------------------


def test_deepcopy_copies_and_keeps_ties():
    linear = a_linear()
    head = PackedLinear(linear.packed, None, dtype=torch.float32)
    model = nn.ModuleList([linear, head, an_embedding()])
    twin = copy.deepcopy(model)
    assert twin[0].packed is twin[1].packed
    assert twin[0].packed is not linear.packed
    assert torch.equal(twin[0].packed.codes, linear.packed.codes)
    assert twin[2].packed is not model[2].packed
    assert twin[0] is not linear
    assert twin[0].bias is not linear.bias
    assert torch.equal(twin[0].bias, linear.bias)
    twin.half()
    assert (linear.dtype, twin[0].dtype) == (torch.float32, torch.float16)
    x = activations(2, 172)
    linear.bias.data.zero_()
    assert not torch.equal(twin.float()[0](x), linear(x))


@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_torch_save_of_a_whole_module(form, bits):
    """A module is an ordinary Python object: torch.save and pickle keep it whole, loading needs weights_only=False."""
    module, x = a_linear(form, bits), activations(2, 172)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


# ---- state dicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "bits"), FORMS)
@pytest.mark.parametrize(("n", "k", "group"), [(45, 172, 64), (33, 31, 32), (1, 1, 32), (64, 301, -1)])
def test_state_dict_round_trip(form, bits, n, k, group):
    source = a_linear(form, bits, n, k, group)
    state = source.state_dict()
    names = ["bias", "weight_codes", "weight_scales"] + ["weight_zeros"] * (form in ("zero", "minimum"))
    assert sorted(state) == names
    target = a_linear(form, bits, n, k, group, seed=1)
    x = activations(3, k)
    assert not torch.equal(target(x), source(x))
    assert target.load_state_dict(state) == ([], [])
    assert torch.equal(target(x), source(x))
    a, b = unpack(target.packed), unpack(source.packed)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)


def test_state_dict_is_canonical_and_small():
    """Row-major, ISA-neutral: two 4-bit codes to a byte, the even input in the low nibble."""
    module = a_linear("zero", 4, 33, 33, 32)
    state, weight = module.state_dict(), unpack(module.packed)
    assert state["weight_codes"].shape == (33, 17)
    assert state["weight_codes"].dtype == torch.uint8
    assert torch.equal(state["weight_codes"] & 15, weight.codes[:, ::2])
    assert torch.equal(state["weight_codes"][:, :16] >> 4, weight.codes[:, 1::2])
    assert torch.equal(state["weight_scales"], weight.scales)
    assert torch.equal(state["weight_zeros"], weight.zeros)
    assert a_linear("sym", 8, 33, 33, 32).state_dict()["weight_codes"].shape == (33, 33)


def test_state_dict_of_a_model():
    def model(seed):
        return nn.Sequential(
            a_linear(seed=seed), nn.Linear(45, 8), a_linear("sym", 8, 16, 8, 32, bias=False, seed=seed)
        )

    source, target = model(0), model(1)
    x = activations(3, 172)
    state = source.state_dict()
    assert target.load_state_dict(state) == ([], [])
    with torch.no_grad():
        assert torch.equal(target(x), source(x))
    del state["0.weight_codes"]
    state["2.weight_more"] = torch.zeros(1)
    result = target.load_state_dict(state, strict=False)
    assert result.missing_keys == ["0.weight_codes"]
    assert result.unexpected_keys == ["2.weight_more"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*0\.weight_codes|Unexpected key.*2\.weight_more"):
        target.load_state_dict(state)


@pytest.mark.parametrize("strict", [True, False])
def test_a_float_weight_is_no_state_of_a_packed_module(strict):
    model = nn.Sequential(a_linear())
    with pytest.raises(
        RuntimeError, match=r"0\.weight is a float weight, and the module is packed: name it in modules"
    ):
        model.load_state_dict({"0.weight": torch.zeros(45, 172)}, strict=strict)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "weight_codes",
            torch.zeros(45, 85, dtype=torch.uint8),
            r"weight_codes must be uint8 \[45, 86\], got .*\[45, 85\]",
        ),
        ("weight_codes", torch.zeros(45, 86), "weight_codes must be uint8"),
        ("weight_scales", torch.zeros(45, 2).half(), r"scales must be .*\[45, 3\].* got torch.float16 \[45, 2\]"),
        ("weight_scales", torch.zeros(45, 3), "scales must be float16 or bfloat16"),
        ("weight_scales", torch.full((45, 3), float("nan")).half(), "scales must be finite"),
        ("weight_zeros", torch.full((45, 3), 16, dtype=torch.uint8), "zero points must lie in 0..15"),
        ("weight_zeros", torch.zeros(45, 4, dtype=torch.uint8), "zeros must be uint8"),
    ],
)
def test_wrong_state_is_an_error_and_changes_nothing(name, value, text):
    model = nn.Sequential(a_linear())
    x = activations(2, 172)
    want = model(x)
    with pytest.raises(RuntimeError, match=f"(?s)0: .*{text}"):
        model.load_state_dict({**model.state_dict(), f"0.{name}": value})
    assert torch.equal(model(x), want)


def test_loaded_state_is_a_copy():
    """As nn.Linear: writing to the loaded tensors afterwards does not reach the module."""
    module, x = a_linear("zero", 4, 32, 32, 32), activations(2, 32)
    state = {name: t.clone() for name, t in a_linear("zero", 4, 32, 32, 32, seed=1).state_dict().items()}
    module.load_state_dict(state)
    want = module(x)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(module(x), want)


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(backend):
    model = nn.Sequential(an_embedding(), a_linear(), nn.GELU(), a_linear("sym", 8, 16, 45, 32, compute="fp32"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for ids in (torch.tensor([[0, 3, 44]]), torch.tensor([[5, 4], [1, 2]])):
            assert torch.equal(compiled(ids), model(ids))
    torch._dynamo.reset()


# ---- together in huge pages -----------------------------------------------------------------------------------------


def test_gathered_modules_compute_the_same():
    """A tied weight stays one, and a copy of a module copies no other's weights."""
    linears = [a_linear(n=1024, k=2048, seed=seed) for seed in range(3)]
    tied = PackedEmbedding(linears[1].packed, dtype=torch.float32)
    model = nn.Sequential(*linears, tied, a_linear())
    x, before = activations(2, 2048), [linear.packed for linear in linears]
    want = [linear(x) for linear in linears]
    gather(model)
    assert all(linear.packed is not old for linear, old in zip(linears, before, strict=True))
    assert tied.packed is linears[1].packed
    assert all(torch.equal(linear(x), y) for linear, y in zip(linears, want, strict=True))
    copied = copy.deepcopy(linears[0])
    assert torch.equal(copied(x), want[0])
    assert copied.packed.codes.untyped_storage().nbytes() == copied.packed.codes.nbytes
