"""The torch.compile backend against the same model with dequantised weights, in fp32 compute."""

import copy
import gc
import logging
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers.pytorch_utils import Conv1D

import torch_cpullm
from torch_cpullm import backend
from torch_cpullm.config import Settings
from torch_cpullm.packing import dequantize
from torch_cpullm.quant import quantize_rtn

VOCABULARY = 96
FP32 = {"compute": "fp32"}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # logits far apart, so that greedy tokens are not decided by rounding
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GREEDY = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _no_silent_fallback(monkeypatch):
    """Every test starts without compiled code, and fails where Dynamo would give up compiling, which it would soon.

    One thread: the tensors are tiny, and two wait for each other on a busy machine.
    """
    torch._dynamo.reset()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch._dynamo.config._config["recompile_limit"], "default", 2)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        yield
    torch._dynamo.reset()


def tiny(family="Llama", seed=0, **changes):
    torch.manual_seed(seed)
    config = getattr(transformers, family + "Config")(**{**SMALL, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(batch=1, length=7, seed=0):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference(model, bits=4, **settings):
    """A copy of ``model`` that computes in float with the weights that the backend uses."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            transposed = isinstance(module, Conv1D)
            weight = module.weight.detach().T if transposed else module.weight.detach()
            recipe = {"bits": 8 if module is head else bits, "group_size": 32, **settings}
            weight = dequantize(quantize_rtn(weight.float(), **recipe)).to(weight.dtype)
            module.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
    return model


def compile_in_place(model):
    """Compile ``model`` for exact activations. Returns the reference."""
    want = reference(model)
    model.compile(backend="cpullm", options=FP32)
    return want


def groups_of(model):
    """The packed weights of ``model`` that are alive."""
    ids = {id(parameter) for parameter in model.parameters()}
    return [group for group in backend._groups.values() if id(group.parameters[0]()) in ids]


def check(got, want, bound=1e-3):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    assert error <= bound, f"relative error {error}"


@pytest.fixture
def graphs(caplog):
    """What the backend said of its graphs: a function that returns the lines since the last call."""
    caplog.set_level(logging.INFO, logger="torch_cpullm")

    def lines():
        found = [record.getMessage() for record in caplog.records if record.name == "torch_cpullm"]
        caplog.clear()
        return found

    return lines


def test_generate():
    model = tiny()
    want = compile_in_place(model)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    got, expected = (each.generate(tokens(2), **options) for each in (model, want))
    assert torch.equal(got.sequences, expected.sequences)
    check(torch.stack(got.logits), torch.stack(expected.logits))


def test_five_models_in_one_process(graphs):
    changes = {"Gemma2": {"head_dim": 16}, "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.3}}
    models = [tiny(family, **changes.get(family, {})) for family in ("Llama", "Qwen2", "GPTNeoX", "Gemma2", "OPT")]
    wants = [compile_in_place(model) for model in models]
    for model, want in zip(models, wants, strict=True):
        check(model(tokens()).logits, want(tokens()).logits)
    assert len(graphs()) == 5
    check(models[0](tokens()).logits, wants[0](tokens()).logits)
    assert not graphs()


@pytest.mark.parametrize(("family", "operators"), [("GPT2", 5), ("Falcon", 4)])  # Falcon's MLP and attention share x
def test_linears_that_are_no_linear_nodes(family, operators, graphs):
    model = tiny(family, n_layer=1)
    want = compile_in_place(model)
    check(model(tokens()).logits, want(tokens()).logits)
    assert f"5 linears in {operators} packed operators (1 in 8 bits)" in graphs()[0]


def test_two_models_of_one_architecture():
    models = [tiny(seed=seed) for seed in (1, 2)]
    wants = [compile_in_place(model) for model in models]
    for i in (0, 1, 0):
        check(models[i](tokens()).logits, wants[i](tokens()).logits)


def test_layers_compiled_one_by_one(graphs):
    model = tiny(num_hidden_layers=4)
    want = reference(model)
    want.lm_head = model.lm_head
    for layer in model.model.layers:
        layer.compile(backend="cpullm", options=FP32)
    check(model(tokens()).logits, want(tokens()).logits)
    assert sum("7 linears in 4 packed operators" in line for line in graphs()) == 4


def test_tied_head():
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    want = reference(model)  # only the head is rounded, to 8 bits
    assert want.lm_head.weight is not want.model.embed_tokens.weight
    model.compile(backend="cpullm", options=FP32)
    check(model(tokens()).logits, want(tokens()).logits, 1e-5)


def test_bfloat16():
    model = tiny().to(torch.bfloat16)
    want = reference(model).float()
    model.compile(backend="cpullm")  # int8 compute
    check(model(tokens()).logits, want(tokens()).logits.bfloat16(), 0.05)


def test_shapes_change_and_left_padding():
    model = tiny()
    want = compile_in_place(model)
    for batch, length in ((1, 5), (3, 9)):
        check(model(tokens(batch, length)).logits, want(tokens(batch, length)).logits)
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens(1, 6)], 1)
    mask = (ids != 0).long()
    options = {**GREEDY, "attention_mask": mask, "num_beams": 2, "max_new_tokens": 2}
    assert torch.equal(model.generate(ids, **options), want.generate(ids, **options))


def test_router_of_a_mixture_stays_exact(graphs):
    model = tiny("Mixtral", num_local_experts=4)
    if transformers.__version__.startswith("5.0."):  # Dynamo cannot trace its grouped products of floats
        model.set_experts_implementation("eager")
    check(*(each(tokens()).logits for each in (model, compile_in_place(model))))
    assert any("MixtralTopKRouter is no nn.Linear" in line for line in graphs())


def test_optimised_models_pass_through_and_do_not_mix(graphs):
    models = [torch_cpullm.optimize(tiny(seed=seed)) for seed in (1, 2)]
    wants = [model(tokens()).logits for model in models]
    for model in models:
        model.compile(backend="cpullm")
    for model, want in zip(models, wants, strict=True):
        check(model(tokens()).logits, want, 1e-6)
    assert any("0 linears" in line for line in graphs())
    linear = models[0].model.layers[0].mlp.up_proj
    x = torch.randn(3, linear.in_features)
    assert torch.equal(torch.compile(linear, backend="cpullm", fullgraph=True)(x), linear(x))


# ---- generate() and pipelines ---------------------------------------------------------------------------------------


def test_generate_of_a_module_from_torch_compile():
    model = tiny()
    want, ids = reference(model), tokens(2)
    plain = model.generate(ids, **GREEDY)
    expected = want.generate(ids, **GREEDY)
    assert not torch.equal(plain, expected)
    compiled = torch.compile(model, backend="cpullm", options=FP32)
    assert torch.equal(compiled.generate(ids, **GREEDY), expected)
    with pytest.raises(ValueError, match="nonsense"):
        compiled.generate(ids, nonsense=1)
    assert torch.equal(model.generate(ids, **GREEDY), plain)  # the model itself stays as it was


def test_other_backends_are_left_alone():
    model = tiny()
    compiled = torch.compile(model, backend=lambda gm, example_inputs: pytest.fail("generate() was compiled"))
    assert compiled.generate == model.generate
    assert torch.equal(compiled.generate(tokens(), **GREEDY), model.generate(tokens(), **GREEDY))
    assert compiled.config is model.config
    assert not hasattr(compiled, "no_such_name")
    lookup = OptimizedModule.__getattr__
    backend._wrap_attribute_lookup()
    assert OptimizedModule.__getattr__ is lookup


def test_pipeline():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", unk_token="w1")
    model = tiny()
    want = reference(model)

    def text(of):
        pipe = transformers.pipeline("text-generation", model=of, tokenizer=tokenizer)
        return pipe("w5 w17 w3 w40", do_sample=False, max_new_tokens=8, return_full_text=False)[0]["generated_text"]

    expected = text(want)
    assert text(torch.compile(model, backend="cpullm", options=FP32)) == expected
    model.compile(backend="cpullm", options=FP32)
    assert text(model) == expected


# ---- weights that change or go --------------------------------------------------------------------------------------


class Fork(nn.Module):
    """Three linears of one input."""

    def __init__(self, sizes=(32, 64, 96), biases=(False, True, True)):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, n, bias) for n, bias in zip(sizes, biases, strict=True))

    def forward(self, x):
        return torch.cat([self.a(x).view(*x.shape[:-1], -1), self.b(x).relu(), self.c(x)], -1)


def test_weights_that_are_replaced_or_written(graphs):
    torch.manual_seed(0)
    model, x = Fork(), torch.randn(5, 64)
    model.compile(backend="cpullm", options=FP32)
    check(model(x), reference(model)(x))
    assert "3 linears in 1 packed" in graphs()[0]
    model.b.weight = nn.Parameter(torch.randn(64, 64))
    model.c.bias = nn.Parameter(torch.randn(96))
    check(model(x), reference(model)(x))
    assert "3 linears in 1 packed" in graphs()[0]  # compiled again
    for write in (
        lambda: model.load_state_dict(Fork().state_dict()),
        lambda: model.a.weight.mul_(2),
        lambda: model.c.bias.zero_(),
        lambda: setattr(model.b.weight, "data", torch.randn(64, 64)),
    ):
        write()
        check(model(x), reference(model)(x))
        assert "packed again, since it was written: a, b, c" in graphs()  # in the same graph
    model.a.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="a, b, c was written and cannot be packed again: weight must be finite"):
        model(x)
    model.a.weight[0, 0] = 1
    model.to(torch.bfloat16)
    check(model(x.bfloat16()), reference(model)(x.bfloat16()), 0.02)


def test_packed_weights_go_with_the_model():
    x = torch.randn(2, 64)
    for _ in range(4):  # each model dies before the next one comes
        model = Fork()
        model.compile(backend="cpullm", options=FP32)
        check(model(x), reference(model)(x))
        weight, (group,) = weakref.ref(model.a.weight), map(weakref.ref, groups_of(model))
        del model
        gc.collect()
        assert weight() is None
        assert group() is None


def test_threads_see_the_raised_limit():
    def run(model, x):
        with torch.no_grad():
            model.compile(backend="cpullm", options=FP32)
            return model(x)

    for _ in range(4):
        model, x = Fork(), torch.randn(2, 64)
        with ThreadPoolExecutor(1) as pool:
            check(pool.submit(run, model, x).result(), reference(model)(x))


@pytest.mark.parametrize(
    ("sizes", "biases", "operators"),
    [
        ((32, 64, 96), (True, False, True), 1),
        ((32, 64, 96), (False, False, False), 1),
        ((32, 64, 50), (False, True, True), 1),  # the last one may end inside a panel
        ((32, 50, 64), (True, True, True), 3),
    ],
)
def test_linears_of_one_input_are_merged(sizes, biases, operators, graphs):
    torch.manual_seed(0)
    model = Fork(sizes, biases)
    want = compile_in_place(model)
    for x in (torch.randn(5, 64), torch.randn(1, 64)):
        check(model(x), want(x))
    assert f"3 linears in {operators} packed" in graphs()[1]
    assert len(groups_of(model)) == operators  # which both graphs share


class Block(nn.Module):
    """Linears from 64 to 32 called a, b, .. and what to do with them."""

    def __init__(self, run, names="a"):
        super().__init__()
        self.run = run
        for name in names:
            setattr(self, name, nn.Linear(64, 32))

    def forward(self, x):
        return self.run(self, x)


def test_an_input_that_is_written_in_between():
    def run(block, x):
        x = x + 1
        first = block.a(x)
        x.mul_(2)
        return first + block.b(x)

    model, x = Block(run, "ab"), torch.randn(3, 64)
    check(compile_in_place(model)(x), model(x))


def test_a_weight_used_twice():
    model, x = Block(lambda block, x: block.a(x) + block.a(x.sin()) + block.a(x)), torch.randn(3, 64)
    check(compile_in_place(model)(x), model(x))
    assert len(groups_of(model)) == 1


def test_linears_that_stay(graphs):
    def run(block, x):
        return block.fork(x), block.a(x.double()), F.linear(x, block.b.weight * 2), x @ x.T

    model, x = Block(run, "ab"), torch.randn(5, 64)
    model.fork = Fork()
    model.a.to(torch.float64)
    model.fork.b.weight[3, 5] = torch.nan
    want = copy.deepcopy(model)
    want.fork.a, want.fork.c = reference(want.fork.a), reference(want.fork.c)
    model.compile(backend="cpullm", options=FP32)
    for got, expected in zip(model(x), want(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert sorted(line.split(": ", 1)[1] for line in graphs()) == [
        "2 linears in 2 packed operators (0 in 8 bits), 0.0 MB",
        "a: its weight is float64 [32, 64]",
        "fork.b: weight must be finite, but holds NaN or inf",
        "linear_4: its weight is no plain parameter",
    ]


def test_autocast():
    model, x = Fork(biases=(True, True, True)), torch.randn(5, 64)
    model.compile(backend="cpullm")
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
        want = reference(model)(x)
    check(got, want, 0.05)


def test_outputs_have_no_gradient(caplog):
    model, x = Fork(), torch.randn(5, 64)
    model.compile(backend="cpullm")
    backend._warn_of_gradients.cache_clear()
    with torch.enable_grad():
        assert not model(x).requires_grad
        assert not model(x[:2]).requires_grad
        model = tiny()  # its graph switches the grad mode
        model.compile(backend="cpullm")
        assert not model(tokens()).logits.requires_grad
    assert caplog.text.count("is for inference") == 1


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rounding"),
    [
        ({"bits": 8}, {"bits": 8}),
        ({"group_size": 64, "sym": True}, {"group_size": 64, "sym": True}),
        ({"scale_dtype": "bfloat16"}, {"scale_dtype": torch.bfloat16}),
    ],
)
def test_options(options, rounding):
    model, x = Fork(), torch.randn(5, 64)
    want = reference(model, **rounding)
    check(torch.compile(model, backend="cpullm", options={**FP32, **options})(x), want(x))


def test_modules_left_out(graphs):
    model = tiny()
    want = reference(model)
    want.lm_head, want.model.layers[0].mlp = model.lm_head, copy.deepcopy(model.model.layers[0].mlp)
    names = ["mlp.down_proj", r"model\.layers\.0\.mlp\.(gate|up)"]
    model.compile(backend="cpullm", options={**FP32, "head_bits": None, "modules_to_not_convert": names})
    check(model(tokens()).logits, want(tokens()).logits)
    assert any(line.endswith("lm_head: excluded by the options") for line in graphs())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"options": {"bit": 4}}, r"options of the backend 'cpullm' are inductor, bits, .*; got 'bit'"),
        ({"options": {"kv_cache": "int8"}}, r"options of the backend 'cpullm' are .*; got 'kv_cache'"),
        ({"options": {"bits": 3}}, r"bits must be 4 or 8, got 3"),
        ({"options": {"group_size": 48}}, r"group_size must be .*, got 48"),
        ({"options": {"inductor": "yes"}}, r"options\['inductor'\] must be True or False, got 'yes'"),
        ({"mode": "fast"}, r"mode must be one of default, .*, got 'fast'"),
    ],
)
def test_wrong_options(arguments, text):
    assert backend.parse_options("reduce-overhead") == (Settings(), False)
    with pytest.raises(ValueError, match=text):
        backend.parse_options(**arguments)
    model, x = Fork(), torch.randn(2, 64)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=text):
        torch.compile(model, backend="cpullm", **arguments)(x)
    check(torch.compile(model, backend="cpullm", options=FP32)(x), reference(model)(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")  # torch's own
def test_inductor():
    model = Fork(biases=(True, True, True))
    model.compile(backend="cpullm", options={**FP32, "inductor": True})
    x = torch.randn(3, 64)
    check(model(x), reference(model)(x))
    model.a.weight.mul_(2)
    check(model(x), reference(model)(x))


SCRIPT = """
import sys, torch
assert not {"torch_cpullm.backend", "torch_cpullm.ops", "torch_cpullm.hf"} & set(sys.modules)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    def forward(self, x):
        return self.down(self.up(x).relu())

    def generate(self, x):
        return self(self(x))

model, x = Model(), torch.randn(3, 64)
with torch.no_grad():
    compiled = torch.compile(model, backend="cpullm")
    error = float((compiled(x) - model(x)).abs().max() / model(x).abs().max())
    assert 0.001 < error < 0.2, error
    assert torch.equal(compiled.generate(x), compiled(compiled(x)))
assert "torch._inductor.compile_fx" not in sys.modules
"""


def test_no_import_and_no_compiler(tmp_path):
    """Found by entry point alone; no program at all can be started."""
    environment = {**os.environ, "PATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
