"""The operator of a group of layers against its oracle, on every level; one layer is a group of one."""

import pytest
import torch
from cases import FLOATS, one_thread
from layer_programs import STRUCTURES, cache_of, call, error, padded_mask, spec

from torch_cpullm import ops
from torch_cpullm.layer_program import MOST_MEMBERS, Program, run_group
from torch_cpullm.layer_reference import run_group as oracle
from torch_cpullm.linear import PackedLinear
from torch_cpullm.packing import QuantizedWeight, pack, unpack

EXACT, ROUNDED = 2e-5, 3e-2  # as in test_layer_program; a group adds the roundings of its members
BOUND = {"fp32": EXACT, "int8": ROUNDED}
ALL = -1  # bypass: every MLP reads all attention


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def members(structure, count=2, compute="fp32", **changes):
    """Specs of one structure with weights of their own."""
    given = {**STRUCTURES[structure], **changes}
    linears = {**given.pop("linears", {}), "compute": compute}
    return [spec(**given, linears=linears, seed=seed) for seed in range(count)]


def run(programs, specs, bypass, steps=((1, 9), (1, 1), (1, 2)), kind=torch.float32, against=None, pads=None):
    """Outputs of a prompt and further tokens, compared with the oracle where ``against`` is a bound."""
    ours, theirs = ([cache_of(kind) for _ in specs] for _ in range(2))
    position, parts = 0, []
    for batch, tokens in steps:
        x, cos, sin = call(specs[0], batch, tokens, position)
        masks = [padded_mask(each, tokens, position, pads) if pads else None for each in specs]
        got = run_group(programs, bypass, [(x, cos, sin, m, c) for m, c in zip(masks, ours, strict=True)])
        if against is not None:
            with one_thread():
                want = oracle(specs, [(x, cos, sin, m, c) for m, c in zip(masks, theirs, strict=True)], bypass)
            assert error(got, want) <= against, (batch, tokens)
        parts.append(got.flatten())
        position += tokens if kind else 0
    return torch.cat(parts)


@pytest.mark.parametrize("compute", BOUND)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures(structure, compute, isa):
    parallel = STRUCTURES[structure].get("parallel", False)
    for count, bypass in ((2, 0),) if parallel else ((2, 0), (3, 1), (2, ALL)):
        specs = members(structure, count, compute)
        run([Program(each) for each in specs], specs, bypass, ((1, 5), (1, 1)), against=BOUND[compute])


@pytest.mark.parametrize("compute", BOUND)
def test_left_padded_batches_and_windows_of_their_own(compute, isa):
    """Each member has its mask: here a window of 5 beside none, as in Gemma."""
    specs = [members("gemma2", 2, compute)[0], members("gemma2", 2, compute, window=0)[1]]
    for bypass in (0, 1, ALL):
        programs = [Program(each) for each in specs]
        run(programs, specs, bypass, ((3, 8), (3, 1), (3, 2)), against=BOUND[compute], pads=(0, 3, 1))
        run(programs, specs, bypass, ((2, 8), (2, 1)), against=BOUND[compute])


@pytest.mark.parametrize("compute", BOUND)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_group_of_one_is_the_layer(structure, compute):
    (one,) = members(structure, 1, compute)
    program = Program(one)
    caches = cache_of(torch.float32), cache_of(torch.float32)
    position = 0
    for tokens in (9, 1, 3):
        x, cos, sin = call(one, 2, tokens, position)
        alone = program(x, cos, sin, None, caches[0])
        for bypass in (0,) if one.parallel else (0, ALL):
            caches[1].length = position
            assert torch.equal(run_group([program], bypass, [(x, cos, sin, None, caches[1])]), alone)
        position += tokens


@pytest.mark.parametrize("structure", ["llama", "gemma2", "neox", "falcon", "halves not at panels"])
@pytest.mark.parametrize("compute", BOUND)
def test_threads_change_no_bit(structure, compute, isa):
    specs = members(structure, 3, compute)
    programs, runs = [Program(each) for each in specs], []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        steps = ((2, 9), (2, 1), (2, 2)) if isa == "ref" else ((2, 17), (2, 1), (2, 2), (2, 70))
        bypasses = (0,) if specs[0].parallel else (0, 1, ALL)
        runs.append(torch.cat([run(programs, specs, bypass, steps, torch.bfloat16) for bypass in bypasses]))
    assert all(torch.equal(each, runs[0]) for each in runs)


@pytest.mark.parametrize("structure", ["llama", "gemma2", "neox", "falcon"])
def test_more_rows_than_the_mlp_takes_at_a_time(structure):
    for compute, bound in BOUND.items():
        specs = members(structure, 2, compute)
        programs = [Program(each) for each in specs]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for bypass in (0,) if specs[0].parallel else (1, ALL):
                run(programs, specs, bypass, ((1, 1030),), None, against=bound)


@pytest.mark.parametrize("kind", [*FLOATS, torch.int8, None])
def test_caches(kind, isa):
    specs = members("gemma2", 2)
    bound = EXACT + {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.int8: 8e-3}.get(kind, 0)
    run([Program(each) for each in specs], specs, 1, kind=kind, against=bound)


def test_equal_norms_share_their_input(isa):
    """Members with the same gains normalise and quantise once: the same bits as each on its own."""
    for structure in ("llama", "falcon", "opt"):
        specs = members(structure, 2, "int8")
        norms = ("input_norm", "mlp_norm")
        for name in norms:
            object.__setattr__(specs[1], name, getattr(specs[0], name))
        shared = run([Program(each) for each in specs], specs, 0, against=ROUNDED)
        nudged = members(structure, 2, "int8")[1]
        for name in norms:
            object.__setattr__(nudged, name, getattr(specs[0], name))
        object.__setattr__(nudged, "eps", nudged.eps * (1 + 1e-6))  # another norm, too little to change a result
        apart = run([Program(specs[0]), Program(nudged)], [specs[0], nudged], 0)
        assert error(apart, shared) <= ROUNDED


def test_a_sum_of_sixteen_bits_is_rounded_once(isa):
    for dtype in (torch.bfloat16, torch.float16):
        specs = members("llama", 3)
        x, cos, sin = call(specs[0], 2, 5, 0, dtype)
        calls = [(x, cos, sin, None, None)] * 3
        got = run_group([Program(each) for each in specs], 1, calls)
        assert got.dtype == dtype
        exact = oracle(specs, [(x.float(), *rest) for _, *rest in calls], 1)
        assert error(got, exact) <= EXACT + 2.0 ** (-8 if dtype == torch.bfloat16 else -11)


def barriers(programs, specs, bypass, position):
    """Barriers of one token behind ``position`` tokens."""
    caches = [cache_of(torch.bfloat16) for _ in specs]
    for tokens in (position, 1):
        x, cos, sin = call(specs[0], 1, tokens, 0)
        run_group(programs, bypass, [(x, cos, sin, None, cache) for cache in caches])
    return torch.ops.cpullm.layer_barriers()


@pytest.mark.parametrize(
    "structure", ["llama", "qwen3", "phi3", "neox", "falcon", "opt", "gemma2", "halves not at panels"]
)
@pytest.mark.parametrize("large", [False, True])
def test_a_group_has_no_more_barriers_than_one_layer(structure, large):
    sizes = {"intermediate": 12800} if large else {}  # more than a thread quantises on its own
    if large and structure != "llama":
        return
    specs = members(structure, 4, "int8", **sizes)
    programs = [Program(each) for each in specs]
    torch.set_num_threads(2)
    for position in (7, 268):  # a long cache takes one more
        one = barriers(programs[:1], specs[:1], 0, position)
        for count in (2, 4):
            for bypass in (0,) if specs[0].parallel else (0, 1, ALL):
                assert barriers(programs[:count], specs[:count], bypass, position) == one


@pytest.mark.parametrize("compute", BOUND)
@pytest.mark.parametrize("structure", ["llama", "biases", "opt", "phi3"])
def test_products_of_all_members_are_sums_in_their_order(structure, compute, isa):
    """Out and down projections of a group, which are one phase each, have the bits of the members' own, added up."""
    for count in (2, 4):
        specs = members(structure, count, compute)
        programs = [Program(each) for each in specs]
        x, cos, sin = call(specs[0], 2, 5)
        given = cos, sin, None, None, None, None, None, 0
        attended = [ops.layer_attention(program.handle, x, *given) for program in programs]
        residual = sum(attended, x)
        for bypass, sources in ((0, [x + a for a in attended]), (ALL, [residual] * count)):
            fed = [ops.layer_mlp(p.handle, source) for p, source in zip(programs, sources, strict=True)]
            for threads in (1, 2):
                torch.set_num_threads(threads)
                got = run_group(programs, bypass, [(x, cos, sin, None, None)] * count)
                assert torch.equal(got, sum(fed, residual))


@pytest.mark.parametrize("compute", BOUND)
def test_down_products_are_one_product_of_all_inputs(compute):
    """``sum_l z_l Wdown_l`` is ``[z_1 .. z_p]`` times the members' weights one after the other in k."""
    specs = members("llama", 4, compute, intermediate=256)
    downs = [each.down for each in specs]
    weights = [unpack(down.packed) for down in downs]
    parts = [torch.cat([getattr(w, name) for w in weights], 1) for name in ("codes", "scales", "zeros")]
    whole = PackedLinear(pack(QuantizedWeight(*parts, 4, 32)), dtype=torch.float32, compute=compute)
    z = torch.randn(3, 4 * 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = sum(down(part) for down, part in zip(downs, z.chunk(4, 1), strict=True))
        assert error(apart, whole(z)) <= 1e-6


def test_what_does_not_fit_is_an_error():
    specs = members("llama", 2)
    programs = [Program(each) for each in specs]
    handles = [program.handle for program in programs]
    x, cos, sin = call(specs[0], 1, 3)
    buffers = [torch.zeros(1, 2, 8, 32) for _ in range(4)]
    good = [handles, x, [cos, sin], [0, 1, 0, 1], [-1, -1], buffers, 0, [2], 0]
    assert ops.layers_forward(*good).shape == x.shape
    wide, parallel = spec(hidden=128), members("neox", 2)
    others = [Program(wide), Program(spec(linears={"compute": "int8"})), *(Program(each) for each in parallel)]
    for place, value, text in (
        (0, [], "rotary must be 2 indices"),
        (0, [handles[0], 10**9], "there is no program"),
        (0, [handles[0], others[0].handle], "x must be a CPU tensor"),
        (0, [handles[0], others[1].handle], "one compute"),
        (1, x[..., :-1], "x must be"),
        (2, [cos], "rotary must be -1 or an index below 1, got 1"),
        (3, [0, 1, 0], "rotary must be 2 indices"),
        (3, [0, 1, -1, -1], "cos must be"),
        (3, [0, 1, -2, 1], "rotary must be -1 or"),
        (4, [0], "masks 1 for each"),
        (4, [-1, 2], "masks must be -1 or an index below 2"),
        (4, [0, -1], "mask must be"),
        (5, buffers[:3], "2 or 4 tensors for each of the 2 programs, got 3"),
        (5, [*buffers[:3], buffers[3][..., :-1]], "v_cache must be"),
        (6, 6, "has room for"),
        (6, -1, "length must not be negative"),
        (7, [1], "must hold all 2"),
        (7, [3], "1 to 8 layers each, 2 in all, got 3"),
        (7, [0, 2], "got 0"),
        (7, [], "must hold all 2"),
        (8, -2, r"bypass must lie in \[-1, 8\], got -2"),
        (8, 9, "bypass must lie"),
    ):
        bad = list(good)
        bad[place] = value
        with pytest.raises(RuntimeError, match=text):
            ops.layers_forward(*bad)
    many = MOST_MEMBERS + 1
    with pytest.raises(RuntimeError, match="1 to 8 layers each"):
        ops.layers_forward([handles[0]] * many, x, [cos, sin], [0, 1] * many, [-1] * many, [], 0, [many], 0)
    x, cos, sin = call(parallel[0], 1, 3)
    with pytest.raises(RuntimeError, match="have no bypass, got 1"):
        ops.layers_forward([p.handle for p in others[2:]], x, [cos, sin], [0, 1, 0, 1], [-1, -1], [], 0, [2], 1)


def test_caches_of_different_lengths_have_no_operator():
    specs = members("llama", 2)
    programs = [Program(each) for each in specs]
    x, cos, sin = call(specs[0], 1, 3)
    caches = [cache_of(torch.float32) for _ in specs]
    programs[0](x, cos, sin, None, caches[0])
    assert run_group(programs, 0, [(x, cos, sin, None, cache) for cache in caches]) is None
    assert run_group(programs, 0, [(x, cos, sin, None, cache) for cache in (caches[0], None)]) is None
