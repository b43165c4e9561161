"""The layer operators given arguments that are wrong, and programs that come and go.

Whatever the arguments, a call computes the layer or raises an error that names the operator; nothing crashes.
"""

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layer_programs import STRUCTURES, cache_of, call, error, spec

from torch_cpullm import ops
from torch_cpullm.layer_program import Program, encode
from torch_cpullm.layer_reference import run_layer

create = torch.ops.cpullm.layer_create.default
free = torch.ops.cpullm.layer_free.default
NAMES = ("program", "x", "cos", "sin", "mask", "k_cache", "v_cache", "k_scale", "v_scale", "length")
LAYER = spec()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_orders_of_inputs():
    """Of linears that read one input they must be equal (as GPTQ makes them), and lie within it."""
    ordered = {"linears": {"ordered": True}}
    for linears, text in (("qkv", "q, k and v"), ("up", "gate and up")):
        other = spec(**ordered)
        linear = getattr(other, linears)[1]
        linear.order = linear.order.flip(0)
        with pytest.raises(ValueError, match=f"{text} must have their inputs in one order"):
            Program(other)
        linear.order = None
        with pytest.raises(ValueError, match=f"{text} must have their inputs in one order"):
            Program(other)
    other = spec(**ordered, parallel=True, norm="layer", norms=("input",), mlp="plain")
    other.up[0].order = other.up[0].order.flip(0)
    with pytest.raises(ValueError, match="products that share an input must have their inputs in one order"):
        Program(other)
    for entry in (-1, 128):
        other = spec(**ordered)
        other.o.order[5] = entry
        with pytest.raises(ValueError, match=rf"perm\[5\] = {entry} is outside \[0, 128\)"):
            Program(other)


@pytest.fixture(scope="module")
def program():
    return Program(LAYER)


def arguments(program, kind=torch.float32, batch=2, tokens=3, length=4, capacity=10):
    """Arguments of a call that is right."""
    cache = [torch.zeros(batch, 2, capacity, 32, dtype=kind) for _ in range(2)]
    scales = [torch.zeros(batch, 2, capacity) if kind == torch.int8 else None for _ in range(2)]
    values = (program.handle, *call(LAYER, batch, tokens), None, *cache, *scales, length)
    return dict(zip(NAMES, values, strict=True))


def forward(given):
    return torch.ops.cpullm.layer_forward(*given.values())


F, Z, ONES = torch.float32, torch.zeros, torch.ones
WRONG = [
    ("x", Z(2, 3), r"x must be a CPU tensor \[b, s, 96\], got \[2, 3\]"),
    ("x", Z(2, 3, 95), r"x must be .* got \[2, 3, 95\]"),
    ("x", Z(1, 2, 3, 96), "x must be"),
    ("x", Z(2, 3, 96, dtype=torch.float64), "x must be float32, bfloat16 or float16"),
    ("x", Z(2, 3, 96, dtype=torch.int32), "x must be float32"),
    ("x", Z(2, 3, 96, dtype=torch.complex64), "x must be float32"),
    ("x", Z(3, 3, 96), r"k_cache must be a CPU tensor \[3, 2, capacity, 32\]"),
    ("x", Z(2, 2, 96), r"cos must be a CPU tensor \[1 or 2, 2, 32\] .* got \[1, 3, 32\]"),
    ("cos", None, r"cos must be a CPU tensor \[1 or 2, 3, 32\]"),
    ("sin", None, r"sin must be"),
    ("cos", Z(3, 32), "cos must be"),
    ("cos", Z(1, 3, 31), r"cos must be .* got \[1, 3, 31\]"),
    ("cos", Z(3, 3, 32), "cos must be"),
    ("cos", Z(1, 4, 32), "cos must be"),
    ("cos", Z(1, 3, 64)[..., ::2], "cos must be .* unit last stride"),
    ("cos", Z(1, 3, 32, dtype=torch.float64), "cos must be float32"),
    ("sin", Z(1, 3, 32, dtype=torch.bfloat16), "cos and sin must have one type and layout"),
    ("sin", Z(2, 3, 32), "cos and sin must have one type and layout"),
    ("sin", Z(1, 3, 40)[..., :32], "cos and sin must have one type and layout"),
    ("mask", ONES(2, 1, 3, 6) > 0, r"mask must be .*\[1 or 2, 1 or 4, 3, 7\].* got \[2, 1, 3, 6\]"),
    ("mask", ONES(2, 1, 3, 8) > 0, "mask must be"),
    ("mask", ONES(2, 1, 1, 7) > 0, "mask must be"),
    ("mask", ONES(3, 1, 3, 7) > 0, "mask must be"),
    ("mask", ONES(2, 2, 3, 7) > 0, "mask must be"),
    ("mask", ONES(2, 7), "mask must be"),
    ("mask", ONES(2, 1, 3, 14)[..., ::2], "mask must be .* unit last stride"),
    ("mask", torch.ones(2, 1, 3, 7, dtype=torch.int64), "mask must be float32"),
    ("mask", torch.ones(2, 1, 3, 7, dtype=torch.uint8), "mask must be float32"),
    ("k_cache", None, "k_cache and v_cache come together"),
    ("v_cache", None, "k_cache and v_cache come together"),
    ("k_cache", Z(2, 2, 6, 32), "k_cache has room for 6 tokens, needed are 7"),
    ("v_cache", Z(2, 2, 6, 32), "v_cache has room for 6 tokens, needed are 7"),
    ("k_cache", Z(2, 4, 10, 32), r"k_cache must be a CPU tensor \[2, 2, capacity, 32\].* got \[2, 4, 10, 32\]"),
    ("k_cache", Z(2, 2, 10, 31), "k_cache must be"),
    ("v_cache", Z(1, 2, 10, 32), "v_cache must be"),
    ("v_cache", Z(2, 2, 320), "v_cache must be"),
    ("v_cache", Z(2, 2, 10, 64)[..., ::2], "v_cache must be .* unit last stride"),
    ("k_cache", Z(2, 2, 10, 32, dtype=torch.bfloat16), "k_cache and v_cache must have one type"),
    ("length", -1, "length must not be negative, got -1"),
    ("length", 8, "k_cache has room for 10 tokens, needed are 11"),
    ("length", 2**39, "k_cache has room for 10 tokens"),
    ("length", 2**63 - 1, "length must"),
    ("length", -(2**63), "length must"),
    ("program", 0, "there is no program 0"),
    ("program", -1, "there is no program -1"),
    ("program", 2**62, "there is no program"),
]


@pytest.mark.parametrize(("name", "value", "text"), WRONG)
def test_error_texts(name, value, text, program):
    assert forward(arguments(program)).shape == (2, 3, 96)
    with pytest.raises(RuntimeError, match="cpullm::layer_forward: .*" + text):
        forward({**arguments(program), name: value})


def test_int8_caches_have_scales(program):
    forward(arguments(program, torch.int8))
    for name in ("k_scale", "v_scale"):
        for bad in (None, Z(2, 2, 9), Z(2, 2, 10, 1), Z(2, 2, 20)[..., ::2], Z(2, 2, 10, dtype=torch.bfloat16)):
            with pytest.raises(RuntimeError, match=f"cpullm::layer_forward: {name} must be a float32 CPU tensor"):
                forward({**arguments(program, torch.int8), name: bad})
    for kind in (torch.uint8, torch.float64, torch.int32):
        with pytest.raises(RuntimeError, match="cpullm::layer_forward: k_cache must be float32"):
            forward(arguments(program, kind))


def test_a_length_without_a_cache(program):
    with pytest.raises(RuntimeError, match="length must be 0 without a cache, got 4"):
        forward({**arguments(program), "k_cache": None, "v_cache": None})


@pytest.mark.parametrize("name", NAMES[1:9])
def test_tensors_of_other_kinds(name, program):
    """On another device, sparse, or of mkldnn's layout: an error."""
    given = arguments(program, torch.int8)
    given["mask"] = torch.ones(2, 1, 3, 7)
    forward(given)
    with pytest.raises((RuntimeError, ValueError)):
        forward({**given, name: given[name].to("meta")})
    with pytest.raises(RuntimeError):
        forward({**given, name: given[name].to_sparse()})
    if given[name].dtype == F:
        with pytest.raises(RuntimeError):
            forward({**given, name: given[name].to_mkldnn()})


def test_batches_that_no_memory_holds(program):
    x, angle = Z(1, 1, 1).expand(2**32, 2**23, 96), Z(1, 1, 32).expand(1, 2**23, 32)
    with pytest.raises(RuntimeError):
        ops.layer_forward(program.handle, x, angle, angle)


# ---- programs -------------------------------------------------------------------------------------------------------


def attempt(tensors, ints, floats):
    """(handle, ""), or (None, the error of layer_create)."""
    failure = ""
    try:
        return create(tensors, ints, floats), ""
    except RuntimeError as caught:
        failure = str(caught)
    assert "cpullm::layer_create: " in failure
    return None, failure


def made(tensors, ints, floats):
    """The error of layer_create, or None, and then the program is gone again."""
    handle, failure = attempt(tensors, ints, floats)
    if handle is None:
        return failure
    free(handle)
    return None


def test_numbers_that_end_early_or_late():
    tensors, ints, floats = encode(LAYER)
    assert made(tensors, ints, floats) is None
    for count in range(len(ints)):
        assert "ints ends before" in made(tensors, ints[:count], floats)
    for count in range(len(floats)):
        assert "floats ends before" in made(tensors, ints, floats[:count])
    assert "too many numbers" in made(tensors, [*ints, 0], floats)
    assert "too many numbers" in made(tensors, ints, [*floats, 0.0])
    assert made([], ints, floats) is not None
    assert made([], [], []) is not None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: 0}, r"hidden must lie in \[1, 16777216\], got 0"),
        ({0: 2**62}, "hidden must lie in"),
        ({0: 97}, "qkv|q|codes"),
        ({1: 3}, "heads must be a multiple of kv_heads"),
        ({2: 5}, r"kv_heads must lie in \[1, 4\]"),
        ({1: 65536, 3: 65536}, "heads x head_dim is too large"),
        ({4: -(2**63)}, "intermediate must lie in"),
        ({5: 3}, r"compute must lie in \[0, 2\], got 3"),
        ({7: 3}, "q_per_group must be"),
        ({9: 2**20}, "the layout leaves"),
        ({11: 2**24}, "the layout leaves"),
        ({12: 2}, "qkv must be one product or three"),
        ({13: 10**6}, "q must lie in"),
        ({13: -1}, "q has no codes or scales"),
        ({16: 0}, r"group size must lie in \[1"),
        ({16: 31}, "group_size must be a positive multiple of 32"),
        ({16: 2**40}, "group_size must be|scales must"),
        ({17: 0}, "q must be a contiguous float32 CPU tensor"),
        ({18: 0}, r"perm must be a contiguous int32 CPU tensor of shape \[96\]"),
    ],
)
def test_numbers_of_programs(changes, text):
    tensors, ints, floats = encode(LAYER)
    for at, value in changes.items():
        ints[at] = value
    with pytest.raises(RuntimeError, match="cpullm::layer_create: .*" + f"({text})"):
        create(tensors, ints, floats)


def test_tensors_of_programs():
    for structure in ("biases", "neox", "sinks", "qwen3", "q and k of different sizes"):
        tensors, ints, floats = encode(spec(**STRUCTURES[structure]))
        for i, t in enumerate(tensors):
            others = [t.to("meta"), t[:-1], t.repeat_interleave(2, -1)[..., ::2], t.float().double(), t[None]]
            for bad in others:
                assert made([*tensors[:i], bad, *tensors[i + 1 :]], ints, floats) is not None, (structure, i)


def test_specs_that_no_program_computes():
    mixed = spec()
    mixed.down.compute = "int8"
    with pytest.raises(ValueError, match="must share one compute"):
        Program(mixed)
    with pytest.raises(ValueError, match="parallel layer has no norms"):
        Program(spec(parallel=True, norms=("input", "attention")))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_mutated_numbers(structure):
    """Programs that are made of numbers nobody wrote: refused, or they run on their sizes without a crash."""
    layer = spec(**STRUCTURES[structure])
    tensors, ints, floats = encode(layer)
    choose = random.Random(len(structure))
    values = (-(2**63), -1, 0, 1, 2, 3, 4, 16, 31, 32, 33, 64, 96, 128, 160, 2**24, 2**31, 2**40, 2**63 - 1)
    ran = 0
    for _ in range(300):
        changed = list(ints)
        for _ in range(choose.choice((1, 1, 1, 2, 3))):
            at = choose.randrange(len(ints))
            near = choose.random() < 0.5
            moved = max(-(2**63), min(changed[at] + choose.choice((-2, -1, 1, 2, 32)), 2**63 - 1))
            changed[at] = moved if near else choose.choice(values)
        handle, _ = attempt(tensors, changed, floats)
        if handle is None:
            continue
        hidden, kv_heads, head_dim = changed[0], changed[2], changed[3]
        cache = torch.zeros(2, kv_heads, 9, head_dim)
        for tokens in (3, 1):
            x, angle = torch.ones(2, tokens, hidden), torch.ones(1, tokens, head_dim)
            y = ops.layer_forward(handle, x, angle, angle, None, cache, cache.clone(), length=5)
            assert y.shape == x.shape
        free(handle)
        ran += 1
    assert ran > 10


def test_freed_programs():
    program = Program(LAYER)
    given = arguments(program)
    forward(given)
    free(program.handle)
    free(program.handle)  # of no program: nothing happens
    free(-5)
    with pytest.raises(RuntimeError, match=f"there is no program {program.handle}"):
        forward(given)
    assert Program(LAYER).handle > program.handle  # no handle comes twice


def test_memory_goes_with_the_program():
    layer = spec(linears={"bias": True})
    codes = weakref.ref(layer.down.packed.codes.untyped_storage())
    program = Program(layer)
    handle, given = program.handle, arguments(program)
    forward(given)
    del layer
    gc.collect()
    forward(given)  # the program holds its weights itself
    del program
    gc.collect()
    with pytest.raises(RuntimeError, match=f"there is no program {handle}"):
        forward(given)
    assert codes() is None


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_memory_returns():
    """Programs of 8 MB made and dropped: what is left is less than two of them."""
    shape = {"hidden": 2048, "intermediate": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128}
    layer = spec(**shape)
    tensors, ints, floats = encode(layer)
    before = 0
    for turn in range(14):
        handle = create([t.clone() for t in tensors], ints, floats)
        free(handle)
        if turn == 3:
            before = resident_bytes()
    assert resident_bytes() - before < 2 * sum(t.nbytes for t in tensors)


def test_two_threads_with_two_programs():
    """Each has its scratch memory and its team; results are those of one after the other."""
    torch.set_num_threads(2)
    layers = [spec(**STRUCTURES[name]) for name in ("llama", "gemma2")]
    for layer in layers:
        for linear in layer.linears():
            linear.compute = "int8"
    programs = [Program(layer) for layer in layers]

    def run(i):
        with torch.no_grad():
            cache, position, parts = cache_of(torch.bfloat16), 0, []
            for tokens in (33, *[1] * 40):
                parts.append(programs[i](*call(layers[i], 1, tokens, position), None, cache))
                position += tokens
            return torch.cat(parts, 1)

    alone = [run(0), run(1)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            together = list(pool.map(run, (0, 1)))
            assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_a_program_freed_while_it_runs():
    layer = spec(hidden=256, intermediate=512)
    program = Program(layer)
    x, cos, sin = call(layer, 1, 256)
    want = run_layer(layer, x, cos, sin, None, None)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            handle = create(*encode(layer))
            runs = [pool.submit(ops.layer_forward, handle, x, cos, sin) for _ in range(2)]
            free(handle)
            for run in runs:
                if run.exception() is None:
                    assert error(run.result(), want) < 1e-4
                else:
                    assert "there is no program" in str(run.exception())
    assert error(program(x, cos, sin, None, None), want) < 1e-4


# ---- as torch sees the operator -------------------------------------------------------------------------------------


def test_opcheck(program):
    for given in (arguments(program), arguments(program, torch.int8), arguments(program, torch.bfloat16, tokens=1)):
        torch.library.opcheck(torch.ops.cpullm.layer_forward.default, tuple(given.values()))


def test_fake_shapes(program):
    given = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments(program).items()}
    y = forward({**given, "x": given["x"].bfloat16()})
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 96), torch.bfloat16, "meta")
