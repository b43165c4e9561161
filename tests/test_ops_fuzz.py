"""Operators given arguments that are wrong, and operators as torch sees them: schemas, fake kernels, torch.compile.

No combination of tensors and numbers may crash the process or read outside of a tensor: the call either satisfies the
documented contract and gives the right answer, or raises an error that names the operator and an argument.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import activations, quantized
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from torch_cpullm import ops, reference
from torch_cpullm.packing import pack

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (torch.float16, torch.bfloat16)
NAMES = ("x", "codes", "scales", "zeros", "bias", "perm", "n", "k", "group_size", "compute")
linear = torch.ops.cpullm.linear.default
embedding = torch.ops.cpullm.embedding.default
dequantize = torch.ops.cpullm.dequantize.default
quantize_weights = torch.ops.cpullm.quantize_weights.default


# ---- the contract, written down a second time -----------------------------------------------------------------------


def up(value, multiple):
    return -(-value // multiple) * multiple


def is_packed(codes, scales, zeros, n, k, group):
    """Whether these tensors are a packed [n, k] matrix, from the schema's description alone."""
    if n <= 0 or k <= 0 or group <= 0 or group % 32:
        return False
    panels, groups = up(n, 32) // 32, -(-k // group)
    if codes.dtype != torch.uint8 or list(codes.shape) not in ([panels, up(k, 32) // 4, width] for width in (64, 128)):
        return False
    shape = [panels, groups, 32]
    if scales.dtype not in SCALES or list(scales.shape) != shape:
        return False
    if zeros is not None and (
        codes.shape[2] == 128 or list(zeros.shape) != shape or zeros.dtype not in (torch.uint8, scales.dtype)
    ):
        return False
    return all(t is None or t.is_contiguous() for t in (codes, scales, zeros))


def is_linear(x, codes, scales, zeros, bias, perm, n, k, group_size, compute):
    if x.dim() == 0 or x.dtype not in FLOATS or x.shape[-1] != k:
        return False
    if not is_packed(codes, scales, zeros, n, k, group_size):
        return False
    if bias is not None and (list(bias.shape) != [n] or bias.dtype not in FLOATS or not bias.is_contiguous()):
        return False
    if perm is not None:
        if list(perm.shape) != [k] or perm.dtype != torch.int32 or not perm.is_contiguous():
            return False
        if bool((perm < 0).any()) or bool((perm >= k).any()):
            return False
    return compute in (0, 1)


def base(form, bits, n=45, k=172, group=64, m=3):
    """Arguments of a valid call, by name."""
    weight = pack(quantized(n, k, group, form, bits))
    perm = torch.randperm(k, generator=torch.Generator().manual_seed(1)).int()
    values = (activations(m, k), weight.codes, weight.scales, weight.zeros, activations(1, n)[0], perm, n, k, group, 0)
    return dict(zip(NAMES, values, strict=True))


# ---- mutations ------------------------------------------------------------------------------------------------------

INTS = (0, -1, 1, 2, 3, 4, 8, 31, 32, 33, 44, 46, 63, 64, 65, 96, 128, 172, 192, 2**31, 2**31 - 1, 2**32, 2**40, 2**62)
INTS += (2**63 - 32, 2**63 - 1, -(2**31), -(2**62), -(2**63))
DTYPES = (*FLOATS, torch.float64, torch.complex64, torch.bool)
DTYPES += (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

MUTATIONS = {
    "one less": lambda t, d: t.narrow(d, 0, t.shape[d] - 1) if t.shape[d] else t,
    "one less, contiguous": lambda t, d: t.narrow(d, 0, t.shape[d] - 1).contiguous() if t.shape[d] else t,
    "one more": lambda t, d: torch.cat([t, t.narrow(d, 0, min(1, t.shape[d]))], d),
    "twice": lambda t, d: torch.cat([t, t], d),
    "empty": lambda t, d: t.narrow(d, 0, 0).contiguous(),
    "selected": lambda t, d: t.select(d, 0) if t.shape[d] else t,
    "unsqueezed": lambda t, d: t.unsqueeze(d),
    "flattened": lambda t, d: t.flatten(),
    "scalar": lambda t, d: t.flatten()[0] if t.numel() else t.new_zeros(()),
    "repeated without memory": lambda t, d: t.narrow(d, 0, min(1, t.shape[d])).expand(
        *(max(s, 1) if i != d else 2**33 for i, s in enumerate(t.shape))
    ),
    "transposed": lambda t, d: t.transpose(d, -1),
    "transposed, contiguous": lambda t, d: t.transpose(d, -1).contiguous(),
    "strided": lambda t, d: torch.stack([t, t], -1)[..., 0],
    "split in two": lambda t, d: t.unflatten(d, (2, t.shape[d] // 2)) if t.shape[d] and t.shape[d] % 2 == 0 else t,
}
FILLS = (-1, 172, 171, 2**31 - 1, -(2**31))  # for perm: just outside, just inside, far outside


@st.composite
def mutated(draw, names):
    """(argument, function of its value) that may or may not make the call wrong."""
    name = draw(st.sampled_from(names))
    if name in ("n", "k", "group_size", "compute", "bits"):
        value = draw(st.sampled_from(INTS) | st.integers(-(2**63), 2**63 - 1))
        return name, lambda _: value
    how = draw(st.sampled_from((*MUTATIONS, "dtype", "none", "fill")))
    at = draw(st.integers(0, 2))
    dtype = draw(st.sampled_from(DTYPES))
    fill = draw(st.sampled_from(FILLS))

    def change(tensor):
        if tensor is None:
            return torch.zeros(2, 3, 32, dtype=dtype) if name == "zeros" else None
        if how == "none":
            return None if name in ("zeros", "bias", "perm") else tensor
        if how == "dtype":
            return tensor if tensor.numel() > 2**20 else tensor.to(dtype)  # rows repeated without memory stay so
        if how == "fill":
            if name != "perm" or not tensor.numel():
                return tensor
            copy = tensor.clone()
            copy.flatten()[at % tensor.numel()] = fill
            return copy
        if tensor.dim() == 0 or tensor.numel() > 2**20:
            return tensor
        return MUTATIONS[how](tensor, at % tensor.dim())

    return name, change


def apply(arguments, mutations):
    for name, change in mutations:
        arguments[name] = change(arguments[name])
    return arguments


FUZZ = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def check_error(error, op, names):
    text = str(error)
    assert op in text, text
    assert any(name in text for name in names), text
    assert "Traceback" not in text


# ---- fuzz -----------------------------------------------------------------------------------------------------------


@FUZZ
@given(
    st.sampled_from([("sym", 4), ("zero", 4), ("minimum", 4), ("sym", 8)]),
    st.lists(mutated(NAMES), min_size=1, max_size=2),
)
def test_linear_arguments(form, mutations):
    arguments = apply(base(*form), mutations)
    if arguments["x"] is not None and arguments["x"].numel() > 2**20:
        return  # a valid call of 16 GB or more: rows repeated without memory
    if arguments["group_size"] >= 2**40 and is_linear(**arguments):
        return  # one group per row, however long; an implementation may refuse it
    names = {name for name, _ in mutations}
    if not is_linear(**arguments):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            linear(*arguments.values())
        # Changing a number, x, or two things at once leaves it open which argument disagrees with which.
        alone = len(names) == 1 and not names & {"x", "n", "k", "group_size"}
        check_error(caught.value, "cpullm::linear", names if alone else NAMES)
        return
    y = linear(*arguments.values())
    x = arguments["x"]
    assert y.shape == (*x.shape[:-1], arguments["n"])
    assert y.dtype == x.dtype
    if names <= {"x", "bias", "perm", "compute"} and y.numel():
        weight = pack(quantized(45, 172, 64, *form))
        compute = "fp32" if arguments["compute"] else "int8"
        want = reference.linear(x, weight, arguments["bias"], arguments["perm"], compute)
        near = 1e-2 if x.dtype == torch.bfloat16 else 1e-3
        assert torch.allclose(y, want, rtol=near, atol=near * float(want.abs().max()))


@FUZZ
@given(
    st.sampled_from([("sym", 4), ("zero", 4), ("minimum", 4), ("sym", 8)]),
    st.lists(mutated(("codes", "scales", "zeros", "n", "k", "group_size")), min_size=1, max_size=2),
)
@example(("sym", 4), [("k", lambda _: 2**62), ("codes", lambda t: t[:, :0])])
def test_dequantize_arguments(form, mutations):
    whole = base(*form)
    arguments = {name: whole[name] for name in ("codes", "scales", "zeros", "n")} | {"k": 172, "group_size": 64}
    arguments = apply(arguments, mutations)
    if is_packed(*arguments.values()):
        return  # the call is right; its values are checked elsewhere
    for op, call in (
        ("cpullm::dequantize", lambda: dequantize(*arguments.values())),
        ("cpullm::embedding", lambda: embedding(torch.zeros(2, dtype=torch.int64), *arguments.values(), torch.float32)),
    ):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            call()
        check_error(caught.value, op, arguments)


@FUZZ
@given(st.lists(mutated(("weight", "bits", "group_size")), min_size=1, max_size=2), st.booleans(), st.booleans())
def test_quantize_weights_arguments(mutations, sym, search):
    arguments = apply({"weight": activations(5, 172), "bits": 4, "group_size": 64}, mutations)
    weight, bits, group = arguments.values()
    if weight.numel() > 2**20:
        return
    right = weight.dim() == 2 and weight.numel() > 0 and weight.is_contiguous() and weight.dtype in FLOATS
    right = right and bits in (4, 8) and group > 0 and group % 32 == 0
    if not right:
        with pytest.raises((RuntimeError, ValueError)) as caught:
            quantize_weights(weight, bits, group, sym, search, torch.float16)
        check_error(caught.value, "cpullm::quantize_weights", arguments)
    elif group < 2**40:
        codes, scales, zeros = quantize_weights(weight, bits, group, sym, search, torch.float16)
        assert codes.shape == weight.shape
        assert scales.shape == zeros.shape == (weight.shape[0], -(-weight.shape[1] // group))
        assert int(codes.max()) < 2**bits


def test_every_mutation_alone_on_every_tensor():
    """The fuzz above chooses at random; this walks through each tensor, mutation and dimension once."""
    wrong = 0
    for form in (("zero", 4), ("minimum", 4), ("sym", 8)):
        for name in ("codes", "scales", "zeros", "bias", "perm"):
            for change in MUTATIONS.values():
                arguments = base(*form)
                value = arguments[name]
                for at in range(value.dim() if value is not None else 0):
                    arguments[name] = change(value, at)
                    if is_linear(**arguments):
                        continue
                    wrong += 1
                    with pytest.raises(RuntimeError, match=f"cpullm::linear.*{name}"):
                        linear(*arguments.values())
    assert wrong > 200


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("x", torch.zeros(()), "x must have at least one dimension"),
        ("x", torch.zeros(3, 0), "last dimension of x must not be empty"),
        ("x", torch.zeros(3, 172, dtype=torch.float64), "x must be float32, bfloat16 or float16"),
        ("n", 0, "n must be positive, got 0"),
        ("n", -45, "n must be positive, got -45"),
        ("n", 2**62, "n must be positive|codes"),
        ("group_size", 48, "group_size must be a positive multiple of 32, got 48"),
        ("group_size", -1, "group_size must be a positive multiple of 32, got -1"),
        ("compute", 3, r"compute must be 0 \(int8\), 1 \(fp32\) or 2 \(bf16\), got 3"),
        ("bias", torch.zeros(46), r"bias must be .* of shape \[45\], got \[46\]"),
        ("bias", torch.zeros(45, dtype=torch.int32), "bias must be float32"),
        ("perm", torch.full((172,), 172, dtype=torch.int32), r"perm\[0\] = 172 is outside \[0, 172\)"),
        ("perm", torch.full((172,), -1, dtype=torch.int32), r"perm\[0\] = -1 is outside"),
        ("perm", torch.zeros(172, dtype=torch.int64), r"perm must be a contiguous int32 CPU tensor of shape \[172\]"),
        ("scales", torch.zeros(2, 3, 32), "scales must be float16 or bfloat16"),
        ("scales", torch.zeros(2, 2, 32).half(), r"scales must have shape \[2, 3, 32\], got \[2, 2, 32\]"),
        ("zeros", torch.zeros(2, 3, 32).bfloat16(), "zeros must be uint8 .* or of the scales' type"),
        ("codes", torch.zeros(2, 48, 65, dtype=torch.uint8), r"codes must have shape .*, got \[2, 48, 65\]"),
        ("codes", torch.zeros(2, 48, 64, dtype=torch.int8), "codes must be uint8"),
        ("codes", torch.zeros(2, 47, 64, dtype=torch.uint8), r"codes must have shape \[2, 48, 64\], got \[2, 47, 64\]"),
        ("codes", torch.zeros(2, 48, 128, dtype=torch.uint8), "zeros are supported for 4-bit codes only"),
    ],
)
def test_error_texts(name, value, text):
    arguments = {**base("zero", 4), name: value}
    with pytest.raises(RuntimeError, match="cpullm::linear: .*" + text):
        linear(*arguments.values())


@pytest.mark.parametrize("name", ["codes", "scales", "zeros", "bias", "perm"])
def test_tensors_on_another_device(name):
    """Mixed devices are an error, not a result: the dispatcher must not take the fake kernel for a real one."""
    arguments = base("zero", 4)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises((RuntimeError, ValueError), match=name):
        linear(*arguments.values())


@pytest.mark.parametrize("name", ["codes", "scales", "zeros"])
def test_rows_of_tensors_on_another_device(name):
    arguments = {key: base("zero", 4)[key] for key in ("codes", "scales", "zeros")}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises((RuntimeError, ValueError), match=name):
        dequantize(*arguments.values(), 45, 172, 64)
    with pytest.raises((RuntimeError, ValueError), match=name):
        embedding(torch.zeros(2, dtype=torch.int64), *arguments.values(), 45, 172, 64, torch.float32)


def test_wrong_bias_is_an_error_without_rows_too():
    arguments = base("sym", 4, m=0)
    arguments["bias"] = torch.zeros(44)
    with pytest.raises(RuntimeError, match="bias"):
        linear(*arguments.values())


def test_benchmark_operators(isa):
    """They measure the machine, on any tensor they are given."""
    memory = torch.zeros(200_001, dtype=torch.uint8)
    for size in (0, 1, 511, 65_535, 65_536, 65_537, 200_000):
        assert size - 65_536 < torch.ops.cpullm.read_memory(memory[1 : size + 1]) <= size
    for bad in (memory[::2], memory.char(), memory.float()):
        with pytest.raises(RuntimeError, match="cpullm::read_memory: x must be a contiguous uint8 CPU tensor"):
            torch.ops.cpullm.read_memory(bad)
    assert torch.ops.cpullm.dot_peak(3) > 0
    for bad in (0, -1, -(2**63)):
        with pytest.raises(RuntimeError, match="cpullm::dot_peak: rounds must be positive"):
            torch.ops.cpullm.dot_peak(bad)


@pytest.mark.parametrize("layout", ["sparse", "mkldnn"])
def test_other_layouts(layout):
    arguments = base("sym", 4)
    arguments["x"] = arguments["x"].to_sparse() if layout == "sparse" else arguments["x"].to_mkldnn()
    with pytest.raises(RuntimeError, match="cpullm::linear"):
        linear(*arguments.values())


def test_wrong_types_and_unknown_compute():
    weight = pack(quantized(32, 64, 32))
    with pytest.raises(ValueError, match="compute must be one of 'int8', 'fp32', 'bf16', got 'int4'"):
        ops.linear(torch.zeros(1, 64), weight, compute="int4")
    for bad in (3, [1.0], "x"):
        with pytest.raises((RuntimeError, TypeError), match="cpullm::linear"):
            ops.linear(bad, weight)


@pytest.mark.parametrize("name", ["x", "codes", "scales"])
def test_none_for_a_tensor(name):
    """torch passes None on as an undefined tensor."""
    with pytest.raises((RuntimeError, TypeError), match=f"cpullm::linear.*{name}"):
        linear(*{**base("zero", 4), name: None}.values())


# ---- no read outside of a tensor ------------------------------------------------------------------------------------

GUARDED = """
import ctypes, mmap, sys
import torch
sys.path.insert(0, sys.argv[1])
from cases import Case, CASES, tensors
from torch_cpullm import ops
from torch_cpullm.packing import PackedWeight

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
kept = []

def guarded(tensor, end):
    # The same values between two pages that may not be touched, against the second one (end) or the first.
    if tensor is None or not tensor.numel():
        return tensor
    pages = -(-tensor.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (first, first + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
    start = first + (pages + 1) * PAGE - tensor.nbytes if end else first + PAGE
    buffer = (ctypes.c_char * tensor.nbytes).from_address(start)
    kept.append((memory, buffer))
    copy = torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy

if sys.argv[2] == "touch":
    t = guarded(torch.zeros(5), True)
    ctypes.string_at(t.data_ptr(), 21)
    sys.exit("the guard does not guard")

torch.set_num_threads(2)
for end in (True, False):
    for case in CASES if end else CASES[2:12:3]:
        if case.k > 1000 and case.bits == 4:
            continue  # longer rows read no further
        weight, x, bias, perm = tensors(case, 9)
        parts = [guarded(t, end) for t in (weight.codes, weight.scales, weight.zeros)]
        near = PackedWeight(*parts, weight.n, weight.k, weight.bits, weight.group_size)
        ids = torch.tensor([0, case.n - 1, case.n // 2])
        bias_near, perm_near, ids_near = (guarded(t, end) for t in (bias, perm, ids))
        xs = {m: guarded(x[:m], end) for m in (1, 2, 9)}
        want = ops.linear(x, weight, bias, perm)
        flat = guarded(torch.cat([torch.nn.functional.pad(x[:4], (0, 5)).flatten(), x[4]]), end)
        strided = flat.as_strided((5, case.k), (case.k + 5, 1))
        for level, reachable in ops.isa_levels().items():
            if not reachable or (level == "ref" and case.k > 200):
                continue
            with ops.use_isa(level):
                for compute in ("int8", "fp32"):
                    for m, x_near in xs.items():
                        got = ops.linear(x_near, near, bias_near, perm_near, compute)
                        assert compute == "fp32" or torch.equal(got, want[:m]), (level, case, m)
                    got = ops.linear(strided, near, bias_near, perm_near, compute)
                    assert compute == "fp32" or torch.equal(got, want[:5]), (level, case)
                ops.quantize_activations(xs[9])
                assert torch.equal(ops.dequantize(near), ops.dequantize(weight))
                assert torch.equal(ops.embedding(ids_near, near, case.x), ops.embedding(ids, weight, case.x))
                for bits, sym in ((4, False), (4, True), (8, True)):
                    ops.quantize_weights(xs[2], bits, 32, sym, True, torch.float16)
        kept.clear()
print("clean")
"""


def run_guarded(mode):
    tests = Path(__file__).parent
    command = [sys.executable, "-W", "ignore", "-c", GUARDED, str(tests), mode]
    return subprocess.run(command, cwd=tests.parent, capture_output=True, text=True, check=False)


def test_no_read_outside_of_any_input():
    """Every input lies against a page that may not be read, once at its end and once at its start, on every level.

    Writes beyond the outputs, which torch allocates, are what ``make sanitize`` runs this file for.
    """
    done = run_guarded("check")
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"
    assert done.stdout == "clean\n"


def test_the_guard_pages_guard():
    done = run_guarded("touch")
    assert done.returncode in (-11, 1)  # 1: a sanitizer reports the fault itself
    assert "does not guard" not in done.stderr


# ---- as torch sees the operators ------------------------------------------------------------------------------------

FORMS = [("sym", 4), ("zero", 4), ("minimum", 4), ("sym", 8)]


@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_opcheck(form, bits):
    a = base(form, bits)
    weight = (a["codes"], a["scales"], a["zeros"])
    for compute in (0, 1):
        torch.library.opcheck(linear, tuple({**a, "compute": compute}.values()))
    torch.library.opcheck(linear, (a["x"].bfloat16()[0], *weight, None, None, 45, 172, 64, 0))
    torch.library.opcheck(embedding, (torch.tensor([[1, 2], [44, 0]]), *weight, 45, 172, 64, torch.bfloat16))
    torch.library.opcheck(dequantize, (*weight, 45, 172, 64))


def test_opcheck_of_the_rest():
    torch.library.opcheck(torch.ops.cpullm.quantize_activations.default, (activations(3, 172),))
    for bits, sym in ((4, True), (8, True)):
        # Zero points are undefined here, so two runs need not agree on them.
        arguments = (activations(3, 172), bits, 64, sym, True, torch.bfloat16)
        torch.library.opcheck(quantize_weights, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(quantize_weights, (activations(3, 172), 4, 64, False, True, torch.float16))


@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_shapes(dtype):
    weight = pack(quantized(45, 172, 64, "zero"))
    codes, scales, zeros = (t.to("meta") for t in (weight.codes, weight.scales, weight.zeros))
    x = torch.empty(2, 3, 172, dtype=dtype, device="meta")
    y = linear(x.transpose(0, 1), codes, scales, zeros, None, None, 45, 172, 64, 0)
    assert (y.shape, y.dtype, y.device.type, y.is_contiguous()) == ((3, 2, 45), dtype, "meta", True)
    ids = torch.empty(4, 5, dtype=torch.int32, device="meta")
    rows = embedding(ids, codes, scales, zeros, 45, 172, 64, dtype)
    assert (rows.shape, rows.dtype, rows.device.type) == ((4, 5, 172), dtype, "meta")
    assert dequantize(codes, scales, zeros, 45, 172, 64).shape == (45, 172)
    real = ops.quantize_activations(torch.zeros(6, 172, dtype=dtype))
    fake = torch.ops.cpullm.quantize_activations.default(x)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend, dynamic):
    weight, table = pack(quantized(45, 172, 64, "zero")), pack(quantized(45, 172, 32, bits=8))
    bias = activations(1, 45)[0]

    def function(ids, x):
        rows = ops.embedding(ids, table, x.dtype) + x
        return ops.linear(rows, weight, bias), ops.linear(rows, weight, compute="fp32"), ops.quantize_activations(rows)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for m in (2, 3, 7):
        ids, x = torch.arange(m), activations(m, 172)
        got, want = compiled(ids, x), function(ids, x)
        for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
            assert torch.equal(a, b)
    torch._dynamo.reset()
