"""A decode step in one operator from the tokens' ids on: the bits of embedding and angles computed on their own."""

import copy

import pytest
import torch
from layer_models import ALL, ids_of
from layer_programs import linear, spec
from torch import nn

import torch_cpullm
from torch_cpullm import ops
from torch_cpullm.kv_cache import CpuLlmCache
from torch_cpullm.layer_angles import CHUNK, Angles, position_of
from torch_cpullm.layer_decoder import DecoderStep
from torch_cpullm.layer_program import Embedding, Head, Program, Stack
from torch_cpullm.linear import PackedEmbedding

create = torch.ops.cpullm.embedding_create.default
FORMS = [{}, {"form": "sym"}, {"form": "minimum"}, {"bits": 8, "group": 96}]


def table_of(dtype=torch.float32, *, rows=70, k=96, **form):
    packed = linear(rows, k, torch.Generator().manual_seed(0), **form).packed
    return PackedEmbedding(packed, dtype=dtype)


def stack_of(positions=50):
    """(programs, stack without caches, cosines and sines of many positions)."""
    programs = [Program(spec(seed=i)) for i in range(2)]
    angle = torch.rand(1, positions, 32, generator=torch.Generator().manual_seed(1))
    return programs, Stack([p.handle for p in programs], [], [0, 1] * 2, [1] * 2, 0), [angle.cos(), angle.sin()]


# ---- the operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_bits_of_the_operators_one_by_one(form, dtype, isa):
    programs, stack, angles = stack_of()
    table = table_of(dtype, **form)
    embedding = Embedding(table)
    for ids in ([[3]], [[0, 69, 5]], [[7], [1]]):
        for kind in (torch.int64, torch.int32):
            ids_, tokens = torch.tensor(ids, dtype=kind), len(ids[0])
            for first in (0, 17, 50 - tokens):
                own = [t[:, first : first + tokens] for t in angles]
                want = stack(ops.embedding(ids_, table.packed, dtype), own, None, 0)
                assert torch.equal(stack(ids_, angles, None, 0, None, embedding, first), want)
                assert torch.equal(stack(ids_, own, None, 0, None, embedding), want)
                assert want.dtype == dtype
    assert len(programs) == 2


def test_ids_that_are_not_contiguous_and_a_head():
    programs, stack, angles = stack_of()
    table, ids = table_of(), torch.arange(6).reshape(2, 3).t()[1:2]
    norm = spec().input_norm
    head = Head("rms", 1e-5, norm, linear(64, 96, torch.Generator().manual_seed(2)))
    want = stack(table(ids), [t[:, 4:6] for t in angles], None, 0, head)
    assert torch.equal(stack(ids, angles, None, 0, head, Embedding(table), 4), want)
    assert len(programs) == 2


def test_what_does_not_fit_is_an_error():
    programs, stack, angles = stack_of()
    table = table_of()
    embedding, ids = Embedding(table), torch.tensor([[3]])
    for bad, text in (
        (torch.tensor([[70]]), r"cpullm::embedding: id 70 is outside \[0, 70\)"),
        (torch.tensor([[-1]]), r"cpullm::embedding: id -1 is outside \[0, 70\)"),
        (torch.tensor([[1, 2**40]]), "is outside"),
        (torch.tensor([[3.0]]), "ids must be an int64 or int32 CPU tensor"),
        (torch.tensor([3]), "x must be a CPU tensor"),
    ):
        with pytest.raises(RuntimeError, match=text):
            stack(bad, angles, None, 0, None, embedding, 0)
    for first in (50, 10**15, 2**63 - 1):
        with pytest.raises(RuntimeError, match=f"cos must be .* from position {first} on, got"):
            stack(ids, angles, None, 0, None, embedding, first)
    with pytest.raises(RuntimeError, match=r"cos must be a CPU tensor \[1 or 1, 1, 32\] with unit last stride, got"):
        stack(ids, angles, None, 0, None, embedding)
    with pytest.raises(RuntimeError, match="x must be a CPU tensor"):
        stack(ids, angles, None, 0, None, Embedding(table_of(k=64)), 0)
    with pytest.raises(RuntimeError, match=f"program {programs[0].handle} is no embedding"):
        stack(ids, angles, None, 0, None, programs[0], 0)
    with pytest.raises(RuntimeError, match="is no head"):
        stack(ids, angles, None, 0, embedding, embedding, 0)
    gone = Embedding(table)
    torch.ops.cpullm.layer_free.default(gone.handle)
    with pytest.raises(RuntimeError, match="there is no program"):
        stack(ids, angles, None, 0, None, gone, 0)
    shrunk = ids.clone()
    shrunk.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the storage of ids must hold 8 bytes, it has 0"):
        stack(shrunk, angles, None, 0, None, embedding, 0)
    table.packed.codes.untyped_storage().resize_(16)
    with pytest.raises(RuntimeError, match="the storage of"):
        stack(ids, angles, None, 0, None, embedding, 0)
    with pytest.raises(ValueError, match="multiplies its rows"):
        Embedding(PackedEmbedding(table_of().packed, dtype=torch.float32, multiplier=2.0))


def test_codes_that_move_are_read_where_they_are():
    programs, stack, angles = stack_of()
    table, ids = table_of(), torch.tensor([[3]])
    embedding, before = Embedding(table), table.packed.codes.data_ptr()
    want = stack(ids, angles, None, 0, None, embedding, 0)
    table.packed.codes.share_memory_()
    assert table.packed.codes.data_ptr() != before
    assert torch.equal(stack(ids, angles, None, 0, None, embedding, 0), want)
    assert len(programs) == 2


def test_numbers_of_embeddings():
    packed = table_of().packed
    tensors, ints = [packed.codes, packed.scales, packed.zeros], [96, 70, 0, 0, 1, 2, packed.group]
    torch.ops.cpullm.layer_free.default(create(tensors, ints))
    for count in range(len(ints)):
        with pytest.raises(RuntimeError, match="embedding_create: ints ends before"):
            create(tensors, ints[:count])
    changes = ((0, 0, "hidden must lie"), (1, 2**40, "rows must lie"), (1, 200, "codes must have shape"))
    changes += ((2, 3, "dtype must lie"), (3, -1, "no codes"), (4, 3, "table must lie"), (6, 31, "multiple of 32"))
    for place, value, text in changes:
        bad = list(ints)
        bad[place] = value
        with pytest.raises(RuntimeError, match=f"embedding_create: .*{text}"):
            create(tensors, bad)
    with pytest.raises(RuntimeError, match="embedding_create: too many numbers"):
        create(tensors, [*ints, 0])


# ---- models ---------------------------------------------------------------------------------------------------------


def call(model, cache, ids, **kwargs):
    length = cache.get_seq_length()
    given = {"position_ids": torch.arange(length, length + ids.shape[1])[None]} | kwargs
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **given)


def warm(model, batch=1):
    """A cache after a prompt, the steps that are learnt from, and one that made the tables."""
    cache = CpuLlmCache(model.config)
    for count in (5, 1, 1, 1, 1, 1):
        call(model, cache, ids_of(model, batch, count))
    return cache


@pytest.fixture
def begun(monkeypatch):
    """The number of steps whose operator began with ids, as a list of one."""
    count, real = [0], Stack.__call__

    def forward(self, x, *args):
        count[0] += x.dtype == torch.int64
        return real(self, x, *args)

    monkeypatch.setattr(Stack, "__call__", forward)
    return count


def same_as_apart(model, cache, ids, monkeypatch, **kwargs):
    """The logits of a step, which are those of embedding and angles computed by their modules."""
    twin = copy.deepcopy(cache)
    got = call(model, cache, ids, **kwargs).logits
    with monkeypatch.context() as patch:
        patch.setattr(Embedding, "is_all_of", lambda *_: False)
        want = call(model, twin, ids, **kwargs).logits
    assert torch.equal(got, want)
    return got


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3", "phi3", "gpt-neox", "olmo2", "smollm3", "qwen3-window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_of_models(name, dtype, begun, monkeypatch):
    """Past the end of a table."""
    model = torch_cpullm.optimize(ALL[name].build().to(dtype))
    for batch in (1, 2):
        cache = warm(model, batch)
        before = begun[0]
        for step in range(CHUNK):
            ids = torch.tensor([[7 * step % 200]] * batch)
            call(model, cache, ids) if step % 9 else same_as_apart(model, cache, ids, monkeypatch)
        assert CHUNK - 2 <= begun[0] - before < CHUNK  # but for the new table


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "granite", "phi3-longrope"])
def test_scaled_rows_and_angles_of_the_longest_position_stay_the_modules(name, begun, monkeypatch):
    model = torch_cpullm.optimize(ALL[name].build())
    cache = warm(model)
    for step in range(3):
        same_as_apart(model, cache, torch.tensor([[step]]), monkeypatch)
    assert begun[0] == 0


def test_positions_of_the_caller(begun, monkeypatch):
    model = torch_cpullm.optimize(ALL["llama"].build())
    cache, ids = warm(model, 2), ids_of(model, 2, 1)
    plain = call(model, copy.deepcopy(cache), ids).logits
    for positions, steps in (([[11]], 1), ([[11], [11]], 1), ([[11], [12]], 0), ([[500]], 0), ([[11.0]], 0)):
        before = begun[0]
        got = same_as_apart(model, copy.deepcopy(cache), ids, monkeypatch, position_ids=torch.tensor(positions))
        assert begun[0] == before + steps, positions
        assert not torch.equal(got, plain) or positions == [[10]]
        call(model, copy.deepcopy(cache), ids)  # a table of these positions again
    assert position_of(torch.zeros(2, 1)) is None
    assert position_of(torch.zeros(0, 1, dtype=torch.int64)) is None


def test_embeddings_of_the_caller(begun):
    model = torch_cpullm.optimize(ALL["llama"].build())
    cache, ids = warm(model), ids_of(model, 1, 1)
    twin, before = copy.deepcopy(cache), begun[0]
    at = {"position_ids": torch.tensor([[10]]), "use_cache": True}
    with torch.no_grad():
        got = model(inputs_embeds=model.model.embed_tokens(ids), past_key_values=twin, **at).logits
    assert begun[0] == before
    assert torch.allclose(got, call(model, cache, ids).logits, atol=1e-5)


def test_an_id_outside_of_the_vocabulary(begun):
    """The embedding's own error; the cache stays what it was."""
    model = torch_cpullm.optimize(ALL["llama"].build())
    cache, ids = warm(model), ids_of(model, 1, 1)
    twin, steps = copy.deepcopy(cache), begun[0]
    for bad in (model.config.vocab_size, -1):
        with pytest.raises(RuntimeError, match=f"cpullm::embedding: id {bad} is outside"):
            call(model, cache, torch.tensor([[bad]]))
    assert begun[0] == steps + 2
    assert cache.get_seq_length() == twin.get_seq_length()
    assert torch.equal(call(model, cache, ids).logits, call(model, twin, ids).logits)


def scaled(table):
    table.multiplier = 3.0


def other_rows(table):
    table.packed = linear(table.packed.n, table.packed.k, torch.Generator().manual_seed(5)).packed


def other_forward(table):
    forward = table.forward
    table.forward = lambda ids: 2 * forward(ids)


def other_class(table):
    table.__class__ = type("Twice", (PackedEmbedding,), {"forward": lambda self, ids: 2 * super_forward(self, ids)})


def hooked(table):
    table.register_forward_hook(lambda module, args, y: 2 * y)


super_forward = PackedEmbedding.forward


@pytest.mark.parametrize("change", [scaled, other_rows, other_forward, other_class, hooked], ids=lambda c: c.__name__)
def test_an_embedding_that_has_changed(change, begun):
    model = torch_cpullm.optimize(ALL["llama"].build())
    cache, ids = warm(model), ids_of(model, 1, 1)
    steps, old = begun[0], model.model.embed_tokens(ids)
    change(model.model.embed_tokens)
    assert not torch.equal(model.model.embed_tokens(ids), old)
    twin = copy.deepcopy(cache)
    got = call(model, cache, ids).logits
    assert begun[0] == steps
    for module in (model, model.model):
        module.__dict__.pop("forward")
    want = call(model, twin, ids).logits
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


def test_angles_that_have_changed(begun, monkeypatch):
    model = torch_cpullm.optimize(ALL["llama"].build())
    cache, module, seen = warm(model), model.model.rotary_emb, []
    for step, change in enumerate(
        (lambda: module.inv_freq.mul_(2), lambda: setattr(module, "attention_scaling", 2.0), lambda: None)
    ):
        before = begun[0]
        change()
        ids = torch.tensor([[step]])
        same_as_apart(model, cache, ids, monkeypatch)
        assert begun[0] == before + (step == 2)
    module.register_forward_hook(lambda *_: seen.append(1))
    before = begun[0]
    call(model, cache, ids_of(model, 1, 1))
    assert (seen, begun[0]) == ([1], before)


def test_harmless_writes_are_forgiven(begun):
    """A number says that something was written to; then everything is compared."""
    module = ALL["llama"].build().model.rotary_emb
    angles, x = Angles(module, ()), torch.zeros(1, 1, 80)
    angles(x, torch.tensor([[1]]))
    module.attention_scaling = module.attention_scaling * 1.0  # another object of the same value
    assert angles.find(2, x.dtype) is not None
    assert angles.find(2, torch.bfloat16) is None
    assert angles.find(1 + CHUNK, x.dtype) is None
    assert angles.find(0, x.dtype) is None


def test_a_step_without_a_table_of_rows():
    """A float embedding, whose module is called."""
    model = torch_cpullm.optimize(ALL["llama"].build(), torch_cpullm.CpuLlmConfig(head_bits=None))
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    warm(model)
    step = model.model.__dict__["forward"]
    assert isinstance(step, DecoderStep)
    assert step._learnt is not None
    assert step._learnt.rows is None
