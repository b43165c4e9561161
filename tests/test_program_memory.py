"""Programs hold addresses: weights whose memory moves or shrinks after a program was made."""

from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # tells ForkingPickler of tensors
from layer_models import ALL, counted, ids_of
from layer_programs import call, linear, spec

import torch_cpullm
from torch_cpullm.layer_program import Head, Program, Stack
from torch_cpullm.layer_spec import Norm


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_a_model_that_was_sent_to_another_process(monkeypatch):
    """Pickling for another process moves every storage to shared memory, in this process as well."""
    model = torch_cpullm.optimize(ALL["llama"].build(), torch_cpullm.CpuLlmConfig())
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size), requires_grad=False)
    ids = ids_of(model, 2, 9)
    steps = counted(monkeypatch, "logits")

    def generate():
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, output_logits=True, return_dict_in_generate=True, **settings)
        return torch.stack(out.logits)

    generate()
    before, want = steps[0], generate()  # every step the short way
    codes = model.model.layers[0].mlp.down_proj.packed.codes
    place = codes.data_ptr()
    try:
        ForkingPickler.dumps(model)
        assert codes.is_shared()
        assert codes.data_ptr() != place
        assert torch.equal(generate(), want)
    finally:
        resource_sharer.stop(5)
    assert steps[0] > before > 0


def program_tensors(layer):
    """Names and tensors that a program of ``layer`` reads from memory that others may have as well."""
    for name in ("codes", "scales", "zeros"):
        yield name, getattr(layer.down.packed, name)
    yield "bias", layer.o.bias
    yield "norm", layer.input_norm.gain


@pytest.mark.parametrize("name", ["codes", "scales", "zeros", "bias", "norm"])
def test_one_tensor_moves_and_shrinks(name):
    layer = spec(linears={"bias": True})
    program, given = Program(layer), (*call(layer, 1, 5), None, None)
    want, tensor = program(*given), dict(program_tensors(layer))[name]
    tensor.untyped_storage().resize_(tensor.nbytes + 64)
    assert torch.equal(program(*given), want)
    kept = tensor.clone()
    for size in (tensor.nbytes - 1, 0):
        tensor.untyped_storage().resize_(size)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=rf"layer_create: the storage of a tensor of .* it has {size}"):
                program(*given)
        with pytest.raises(ValueError, match="the storage of a tensor of"):
            Program(layer)
    tensor.untyped_storage().resize_(tensor.nbytes)
    tensor.copy_(kept)
    assert torch.equal(program(*given), want)
    tensor.untyped_storage().share_memory_()
    assert torch.equal(program(*given), want)


def test_a_tensor_of_other_memory_is_read_and_of_another_size_refused():
    layer = spec()
    program, given = Program(layer), (*call(layer, 1, 5), None, None)
    program(*given)
    scales = layer.down.packed.scales
    scales.set_(scales * 2)
    twice = Program(layer)
    assert torch.equal(program(*given), twice(*given))
    scales.set_(scales[:1].clone())
    with pytest.raises(RuntimeError, match=r"layer_create: scales must have shape"):
        program(*given)


def test_a_head():
    layer, gen = spec(), torch.Generator().manual_seed(0)
    matrix = linear(70, layer.hidden, gen)
    head, program, (x, cos, sin) = (
        Head("rms", 1e-5, Norm(torch.ones(layer.hidden)), matrix),
        Program(layer),
        call(layer, 1, 1),
    )

    stack = Stack([program.handle], [], [0, 1], [1], 0)

    def run():
        return stack(x, [cos, sin], None, 0, head)

    want = run()
    matrix.packed.scales.share_memory_()
    assert torch.equal(run(), want)
    matrix.packed.codes.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"head_create: the storage of a tensor of head must hold .* it has 0"):
        run()


def test_numbers_of_programs_begin_at_a_random_place():
    assert Program(spec()).handle > 1 << 20
