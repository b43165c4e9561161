"""The layer operators against their oracle, on every level: structures, sizes, types, masks, caches.

fp32 compute differs from the oracle by the order of additions alone, :data:`EXACT` of the largest output. With int8
compute that difference may move a value over the edge between two codes, one of 127 steps: :data:`ROUNDED`.
"""

import pytest
import torch
from cases import FLOATS, generator, one_thread
from layer_programs import STRUCTURES, cache_of, call, error, padded_mask, spec

from torch_cpullm.layer_program import Program
from torch_cpullm.layer_reference import run_layer

EXACT, ROUNDED = 2e-5, 2e-2
BOUND = {"fp32": EXACT, "int8": ROUNDED}
COMPUTES = tuple(BOUND)
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def build(structure, compute="fp32", **changes):
    given = {**STRUCTURES[structure], **changes}
    return spec(**{**given, "linears": {**given.get("linears", {}), "compute": compute}})


def want(layer, x, cos, sin, mask, cache):
    with one_thread():
        return run_layer(layer, x, cos, sin, mask, cache)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures(structure, compute, isa):
    """A prompt, tokens and a chunk behind a cache; then a left-padded batch."""
    layer = build(structure, compute)
    program = Program(layer)
    for batch in (1, 3):
        ours, theirs, position = cache_of(torch.float32), cache_of(torch.float32), 0
        for tokens in (15, 1, 3, 1) if batch == 1 else (7, 1):
            x, cos, sin = call(layer, batch, tokens, position)
            mask = padded_mask(layer, tokens, position) if batch > 1 else None
            got = program(x, cos, sin, mask, ours)
            assert error(got, want(layer, x, cos, sin, mask, theirs)) <= BOUND[compute], (batch, tokens)
            position += tokens
        assert ours.length == theirs.length == position


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sizes(batch, compute, isa):
    layer = build("gemma2", compute, window=20)
    program = Program(layer)
    for tokens in (1, 2, 3, 15, 33, 130):
        if isa == "ref" and tokens * batch > 50:
            continue
        x, cos, sin = call(layer, batch, tokens)
        assert error(program(x, cos, sin, None, None), want(layer, x, cos, sin, None, None)) <= BOUND[compute], tokens


@pytest.mark.parametrize("tokens", [1025, 1100])
@pytest.mark.parametrize("structure", ["llama", "gemma2", "neox", "falcon", "halves not at panels"])
def test_more_rows_than_the_mlp_takes_at_a_time(structure, tokens):
    """The last rows are so few that each thread quantises them itself, when there are several threads."""
    for compute in COMPUTES:
        layer = build(structure, compute)
        program = Program(layer)
        x, cos, sin = call(layer, 1, tokens)
        expected = want(layer, x, cos, sin, None, None)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = program(x, cos, sin, None, None)
            assert error(got, expected) <= BOUND[compute], (compute, threads)


@pytest.mark.parametrize("structure", ["llama", "gemma2", "neox", "q and k of different sizes", "halves not at panels"])
@pytest.mark.parametrize("compute", COMPUTES)
def test_threads_change_no_bit(structure, compute, isa):
    layer = build(structure, compute)
    program, runs = Program(layer), []
    for threads in (1, 2, 3, 4, 5):
        torch.set_num_threads(threads)
        cache, position, parts = cache_of(torch.bfloat16), 0, []
        for tokens in (17, 1, 2) if isa == "ref" else (33, 1, 2, 70, 150):
            parts.append(program(*call(layer, 2, tokens, position), None, cache))
            position += tokens
        runs.append(torch.cat(parts, 1))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("structure", ["llama", "gemma2", "falcon", "per channel"])
def test_the_batch_changes_no_bit(structure, isa):
    """int8 compute: a row's products depend on that row alone."""
    layer = build(structure, "int8")
    program = Program(layer)
    caches, position = [cache_of(torch.float32) for _ in range(4)], 0
    for tokens in (9, 1, 2):
        x, cos, sin = call(layer, 3, tokens, position)
        together = program(x, cos, sin, None, caches[3])
        for row in range(3):
            alone = program(x[row : row + 1], cos, sin, None, caches[row])
            assert torch.equal(alone[0], together[row])
        position += tokens


@pytest.mark.parametrize("kind", [*FLOATS, torch.int8, None])
@pytest.mark.parametrize("compute", COMPUTES)
def test_caches(kind, compute, isa):
    """What the two write may differ by a rounding, and so may what they read."""
    layer = build("gemma2", compute)
    program = Program(layer)
    bound = BOUND[compute] + {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.int8: 4e-3}.get(kind, 0)
    ours, theirs, position = cache_of(kind), cache_of(kind), 0
    for tokens in (15, 1, 1, 3):
        x, cos, sin = call(layer, 2, tokens, position)
        got = program(x, cos, sin, None, ours)
        assert error(got, want(layer, x, cos, sin, None, theirs)) <= bound, tokens
        position += tokens if kind else 0
    if kind:
        assert error(ours.keys, theirs.keys) <= bound + ROUNDING.get(kind, 2**-6)
        assert error(ours.values, theirs.values) <= bound + ROUNDING.get(kind, 2**-6)


def test_a_long_cache_is_read_in_parts(isa):
    layer = build("llama")
    program = Program(layer)
    caches = [cache_of(torch.float32) for _ in range(2)]
    gen = generator(3)
    for _ in range(3 if isa == "ref" else 1):
        tokens = 600
        keys, values = (torch.randn(2, 2, tokens, 32, generator=gen) for _ in range(2))
        for cache in caches:
            cache.update(keys, values)
    for tokens in (1, 2, 30):
        x, cos, sin = call(layer, 2, tokens, caches[0].length)
        got = program(x, cos, sin, None, caches[0])
        assert error(got, want(layer, x, cos, sin, None, caches[1])) <= EXACT


MASKS = {
    "bool": lambda m: m,
    "added": lambda m: torch.zeros(m.shape).masked_fill(~m, -torch.inf),
    "added, finite": lambda m: torch.zeros(m.shape).masked_fill(~m, torch.finfo(torch.float32).min),
    "bfloat16": lambda m: torch.zeros(m.shape, dtype=torch.bfloat16).masked_fill(~m, -torch.inf),
    "float16": lambda m: torch.zeros(m.shape, dtype=torch.float16).masked_fill(~m, -torch.inf),
    "one for all": lambda m: m[1:2],
    "of each head": lambda m: m.repeat(1, 4, 1, 1),
    "expanded": lambda m: m[1:2].expand(3, 4, -1, -1),
    "rows of a larger one": lambda m: torch.nn.functional.pad(m, (2, 3, 1, 0))[:, :, 1:, 2:-3],
    "soft": lambda m: torch.randn(m.shape, generator=generator(1)),
    "nothing to see": lambda m: m & (torch.arange(3) != 1)[:, None, None, None],
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, isa):
    """A mask alone decides, whatever the window; with a cache its columns are all keys."""
    layer = build("sinks" if name == "soft" else "llama", window=2)
    program = Program(layer)
    ours, theirs, position = cache_of(torch.float32), cache_of(torch.float32), 0
    for tokens in (6, 1, 2):
        x, cos, sin = call(layer, 3, tokens, position)
        mask = MASKS[name](padded_mask(build("llama"), tokens, position))
        got = program(x, cos, sin, mask, ours)
        assert error(got, want(layer, x, cos, sin, mask, theirs)) <= EXACT, tokens
        position += tokens


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("structure", ["llama", "gemma2", "neox"])
def test_types(structure, dtype, isa):
    """x, the result, cos and sin of one type; inside it is float32, and rounded once."""
    layer = build(structure)
    program = Program(layer)
    for tokens in (1, 9):
        x, cos, sin = call(layer, 2, tokens, 3, dtype, rope_dtype=dtype)
        got = program(x, cos, sin, None, None)
        assert got.dtype == dtype
        exact = want(layer, x.float(), cos, sin, None, None)
        assert error(got, exact) <= EXACT + ROUNDING[dtype]


def test_layouts_of_x_and_angles(isa):
    layer = build("llama")
    program = Program(layer)
    x, cos, sin = call(layer, 3, 5)
    plain = program(x, cos, sin, None, None)
    wide = torch.full((3, 5, 200), torch.nan)
    wide[..., 3:99] = x
    spread = torch.full((3, 5, 96, 2), torch.nan)
    spread[..., 0] = x
    for other in (wide[..., 3:99], spread[..., 0], x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not other.is_contiguous()
        assert torch.equal(program(other, cos, sin, None, None), plain)
    angles = torch.cat([cos, sin], -1)  # rows side by side; one per sequence; longer than needed
    own = [t.repeat(3, 1, 1) for t in (cos, sin)]
    for pair in ((angles[..., :32], angles[..., 32:]), own, [torch.nn.functional.pad(t, (0, 5)) for t in own]):
        assert torch.equal(program(x, *pair, None, None), plain)
    shifted = call(layer, 3, 5, 7)[1:]
    mixed = [torch.cat([a, b, a]) for a, b in zip((cos, sin), shifted, strict=True)]
    got = program(x, *mixed, None, None)
    assert error(got, want(layer, x, *mixed, None, None)) <= EXACT


def test_nothing_to_do():
    program = Program(build("llama"))
    for batch, tokens in ((0, 3), (2, 0)):
        x, cos, sin = call(build("llama"), batch, tokens)
        assert program(x, cos, sin, None, None).shape == (batch, tokens, 96)
        assert program(x, cos, sin, None, cache_of(torch.float32)).shape == (batch, tokens, 96)


def test_rows_that_are_not_finite(isa):
    """They spoil their own sequence, earlier tokens as well (0 times NaN, as in torch), and nothing else."""
    for compute in COMPUTES:
        layer = build("llama", compute)
        program = Program(layer)
        x, cos, sin = call(layer, 2, 5)
        clean = program(x, cos, sin, None, None)
        x[1, 3, 7] = torch.nan
        got = program(x, cos, sin, None, None)
        assert torch.equal(got[0], clean[0])
        assert bool(got[1, 3:].isnan().all())


@pytest.mark.parametrize("kind", FLOATS)
def test_memory_behind_the_last_token_is_not_read(kind, isa):
    layer = build("gemma2")
    program = Program(layer)
    results = []
    for rest in (0.0, torch.nan):
        k, v = (torch.full((2, 2, 400, 32), rest, dtype=kind) for _ in range(2))
        position, parts = 0, []
        for tokens in (5, 1, 2, 40):
            x, cos, sin = call(layer, 2, tokens, position)
            parts.append(torch.ops.cpullm.layer_forward(program.handle, x, cos, sin, None, k, v, None, None, position))
            position += tokens
        results.append(torch.cat(parts, 1))
    assert torch.equal(*results)


def test_no_write_beside_the_new_tokens(isa):
    """All of a larger buffer but [length, length + s) of the cache keeps its bytes."""
    for kind in (*FLOATS, torch.int8):
        layer = build("llama")
        program = Program(layer)
        fill = 77
        big = [torch.full((4, 4, 13, 40), fill, dtype=kind) for _ in range(2)]
        scales = [torch.full((4, 4, 13), float(fill)) for _ in range(2)] if kind == torch.int8 else [None, None]
        k, v = (t[1:3, 1:3, 1:12, 3:35] for t in big)
        k_scale, v_scale = (None if t is None else t[1:3, 1:3, 1:12] for t in scales)
        x, cos, sin = call(layer, 2, 3, 4)
        torch.ops.cpullm.layer_forward(program.handle, x, cos, sin, None, k, v, k_scale, v_scale, 4)
        for t in (k, v, k_scale, v_scale):
            if t is not None:
                assert bool((t[:, :, 4:7] != fill).any())
                t[:, :, 4:7] = fill
        assert all(bool((t == fill).all()) for t in (*big, *scales) if t is not None)


BARRIERS = {  # of one token: small layer, large layer; one more for a cache of more than 256 tokens
    "llama": (5, 6),
    "qwen3": (5, 6),
    "phi3": (5, 6),
    "neox": (5, 6),
    "falcon": (5, 6),
    "gptj": (5, 6),
    "opt": (5, 6),
    "gemma2": (7, 8),  # a norm behind attention and one behind the MLP need whole rows
    "q and k of different sizes": (8, 9),  # and the norm of all heads
}


@pytest.mark.parametrize("structure", BARRIERS)
def test_barriers_of_a_token(structure):
    """Each costs microseconds per layer. With few inputs each thread quantises all rows itself, which saves some."""
    large = {"hidden": 4096, "intermediate": 12800, "head_dim": 128, "heads": 32, "kv_heads": 4}
    for changes, count in zip(({}, large), BARRIERS[structure], strict=True):
        if changes and structure not in ("llama", "q and k of different sizes"):
            continue
        layer = build(structure, "int8", **changes, **({"rotary_dim": 128} if changes else {}))
        program, cache = Program(layer), cache_of(torch.bfloat16)
        torch.set_num_threads(2)
        for tokens, position, more in ((7, 0, None), (1, 7, 0), (260, 8, None), (1, 268, 1)):
            program(*call(layer, 1, tokens, position), None, cache)
            if more is not None:
                split = more and not layer.window  # a window shows too few keys to be split
                assert torch.ops.cpullm.layer_barriers() == count + split
