"""save_pretrained and reload of packed models: bit-identical, whole or not at all, and nothing damaged loads."""

from __future__ import annotations

import copy
import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import fresh
import pytest
import torch
from families import FAMILIES, VERSION, VOCAB, Family
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_models import (
    BY_NAME,
    IDS,
    UP,
    checkpoints,
    copied,
    edit_config,
    logits,
    logits_of,
    optimised,
    tree,
)
from small_models import llama
from transformers import AutoModel, AutoModelForCausalLM

import torch_cpullm
from torch_cpullm import CpuLlmConfig
from torch_cpullm.checkpoint import FORMAT_VERSION, Form, form_of
from torch_cpullm.linear import STORED, PackedLinear
from torch_cpullm.packing import pack
from torch_cpullm.plan import keep_original
from torch_cpullm.quant import quantize_rtn

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return fresh.install_into(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family name -> a checkpoint of its optimised model; not to be changed."""
    return checkpoints(tmp_path_factory.mktemp("saved"))


# ---- bit-identical --------------------------------------------------------------------------------------------------

RELOAD = """
import sys
from pathlib import Path
import torch
assert not any(name == "transformers" or name == "torch_cpullm.hf" for name in sys.modules)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
ids = load_file(sys.argv[1])["ids"]
for path in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        found = {"logits": model(ids).logits}
    mask = torch.ones_like(ids)
    found["tokens"] = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    save_file(found, path / "found")
    import torch_cpullm
    (path / "report").write_text(str(torch_cpullm.report(model)))
"""


@pytest.fixture(scope="module")
def reloaded(saved, installed):
    """Family name -> what one fresh process, which imports nothing of ours, finds in its checkpoint."""
    ids = installed / "ids"
    save_file({"ids": IDS}, ids)
    paths = [saved(family.name) for family in FAMILIES]
    fresh.run(RELOAD, installed, ids, *paths)
    return {path.name: (load_file(path / "found"), (path / "report").read_text()) for path in paths}


@every_family
def test_reload_in_a_fresh_process(family: Family, reloaded):
    model = optimised(family.name)
    found, report = reloaded[family.name]
    assert torch.equal(found["logits"], logits(model))
    mask = torch.ones_like(IDS)
    assert torch.equal(found["tokens"], model.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False))
    assert report == str(torch_cpullm.report(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2"])
def test_from_pretrained_save_reload_and_save_again(name, dtype, tmp_path):
    BY_NAME[name].build(dtype).save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=CpuLlmConfig(kv_cache="int8"))
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert again.dtype == dtype
    assert again.hf_quantizer.quantization_config.kv_cache == "int8"
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    back = again.dequantize()
    assert torch.equal(logits(back), logits(torch_cpullm.restore(model)))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    assert other.dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{"head_bits": None}, {"modules_to_not_convert": ["lm_head", "embed_tokens", "wte"]}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_ends_that_stay_in_float(name, options, tmp_path):
    model = torch_cpullm.optimize(BY_NAME[name].build(), torch_cpullm.CpuLlmConfig(**options))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == BY_NAME[name].tied


def test_shards(tmp_path, saved):
    model = optimised("llama-tied")
    model.save_pretrained(tmp_path / "m", max_shard_size="30KB")
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model))
    (tmp_path / "m" / files[1]).unlink()
    with pytest.raises((OSError, ValueError), match=r"model-00002-of-\d+\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_forms_of_other_origins(tmp_path):
    """Float minima as GGUF's Q4_1 has them, per-channel groups, a layer that differs from its siblings."""
    model = torch_cpullm.optimize(llama(), CpuLlmConfig(modules_to_not_convert=["v_proj"]))
    layers = model.model.layers
    for place, form in ((layers[0].mlp, (4, 64)), (layers[1].mlp, (4, -1))):
        weight = quantize_rtn(place.down_proj.dequantize(), *form)
        if place is layers[0].mlp:
            minima = -weight.scales * weight.zeros.to(weight.scales.dtype)
            weight = type(weight)(weight.codes, weight.scales, minima, 4, 64)
        new = PackedLinear(pack(weight), None, dtype=torch.float32)
        keep_original(new, torch.nn.Linear(112, 64, bias=False))
        place.down_proj = new.eval()
    model.save_pretrained(tmp_path / "m")
    modules = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]["modules"]
    assert modules["model.layers.0.mlp.down_proj"]["zeros"] == "minimum"
    assert modules["model.layers.1.mlp.down_proj"]["group_size"] == -1
    assert "model.layers.*.mlp.up_proj" in modules
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(logits_of(again), logits_of(model))
    rows = {row.name: row.reason for row in torch_cpullm.report(again).rows if row.state == "float"}
    assert set(rows.values()) == {"excluded by modules_to_not_convert or head_bits"}


def test_a_part_of_a_model(saved, tmp_path):
    whole = optimised("llama")
    part = AutoModel.from_pretrained(saved("llama"))
    with torch.no_grad():
        want = whole.model(IDS).last_hidden_state
        assert torch.equal(part(IDS).last_hidden_state, want)
    part.save_pretrained(tmp_path / "part")
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "part")(IDS).last_hidden_state, want)


def test_saving_changes_nothing_about_the_model(tmp_path):
    model = torch_cpullm.optimize(BY_NAME["qwen3"].build())
    want, config = logits(model), model.config.to_dict()
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "a")
    assert {**model.config.to_dict(), **{k: config.get(k) for k in ("dtype", "architectures")}} == config
    assert torch.equal(logits(model), want)
    del model
    twin.save_pretrained(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    with pytest.raises(ValueError, match="takes no state_dict"):
        twin.save_pretrained(tmp_path / "c", state_dict={})


def with_tokenizer(path: Path, target: Path) -> Path:
    """A copy with a small tokenizer made here: token i is the word w<i>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w1")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    copied(path, target)
    fast.save_pretrained(target)
    return target


def words_after(model, ids: list[int], new: int) -> str:
    """What the model says, without spaces."""
    prompt = torch.tensor([ids])
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
    return "".join(f"w{index}" for index in tokens[0, len(ids) :].tolist())


def test_pipeline(saved, tmp_path, installed):
    """With no import of ours."""
    path = with_tokenizer(saved("llama"), tmp_path / "m")
    code = """
import sys
from transformers import pipeline
pipe = pipeline("text-generation", model=sys.argv[1])
print(pipe("w3 w4 w5", max_new_tokens=4, do_sample=False)[0]["generated_text"])
print(type(pipe.model.lm_head).__name__)
"""
    lines = fresh.run(code, installed, path).stdout.splitlines()
    assert lines[0].replace(" ", "") == "w3w4w5" + words_after(optimised("llama"), [3, 4, 5], 4)
    assert lines[1] == "PackedLinear"


SERVED = ("fastapi", "uvicorn", "openai", "pydantic")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in SERVED),
    reason=f"`transformers serve` and its client need {', '.join(SERVED)}: pip install torch_cpullm[test]",
)
def test_serve(saved, tmp_path, installed):
    """`transformers serve DIR`, streamed to the openai client; `transformers chat` is such a client."""
    path = with_tokenizer(saved("llama"), tmp_path / "m")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = """
import sys, time, urllib.request
from openai import OpenAI
address, model = sys.argv[1:]
for _ in range(600):
    try:
        urllib.request.urlopen(address + "/health")
        break
    except OSError:
        time.sleep(0.1)
client = OpenAI(base_url=address + "/v1", api_key="none")
messages = [{"role": "user", "content": "w3 w4 w5"}]
chunks = client.chat.completions.create(model=model, messages=messages, max_tokens=5, temperature=0, stream=True)
print(*(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
"""
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    chosen = ["--force-model", str(path)] if VERSION < (5, 1) else [str(path)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, *chosen, "--host", "127.0.0.1", "--port", str(port)],
            env=fresh.environment(installed),
            stdout=log,
            stderr=log,
        )
        try:
            done = fresh.run(client, installed, f"http://127.0.0.1:{port}", path, check=False)
        finally:
            server.terminate()
            server.wait(30)
    assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
    assert done.stdout.replace(" ", "").strip() == words_after(optimised("llama"), [3, 4, 5], 5)


# ---- without the package, and with another one ----------------------------------------------------------------------


def test_the_hint_stands_where_it_is_read(saved, installed):
    path = saved("llama")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format_version"]) == ("cpullm", FORMAT_VERSION)
    for text in (config["hint"], (path / "README.md").read_text()):
        assert "pip install torch_cpullm" in text
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = fresh.run(code, installed, path, check=False, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 1, "random weights must not be taken for the model's"
    assert "pip install torch_cpullm" in done.stderr
    assert fresh.run("import torch_cpullm.hf\n" + code, installed, path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_autoload_is_light(installed):
    code = """
import sys, time
import torch
assert "torch_cpullm._autoload" in sys.modules
print(*(name for name in sys.modules if name.split(".")[0] in ("torch_cpullm", "transformers", "safetensors")))
from importlib.metadata import entry_points
(entry,) = {point.value: point for point in entry_points(group="torch.backends", name="torch_cpullm")}.values()
times = []
for _ in range(9):
    for name in ("torch_cpullm", "torch_cpullm._autoload"):
        del sys.modules[name]
    start = time.perf_counter()
    entry.load()()
    times.append(time.perf_counter() - start)
print(min(times) * 1e3)
"""
    names, milliseconds = fresh.run(code, installed).stdout.splitlines()
    assert names.split() == ["torch_cpullm", "torch_cpullm._autoload"]
    assert float(milliseconds) < 2


def test_autoload_never_raises(installed):
    """Neither `import torch` nor `import transformers` fails when ours does."""
    code = """
import sys
import torch
from torch_cpullm import _autoload
del _autoload._register
import transformers.quantizers.auto as auto
assert "cpullm" not in auto.AUTO_QUANTIZER_MAPPING
import transformers.modeling_utils
_autoload.sys = None
_autoload.autoload()
"""
    done = fresh.run(code, installed)
    assert "transformers will not know quant_method cpullm" in done.stderr


def test_registration_in_either_order(installed):
    for code in (
        "import transformers.quantizers.auto as a, transformers.modeling_utils;"
        "assert 'cpullm' in a.AUTO_QUANTIZER_MAPPING",
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as a, AutoHfQuantizer; import torch;"
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM; assert 'cpullm' in a",
        "import torch_cpullm; torch_cpullm.CpuLlmConfig; import transformers.quantizers.auto as a;"
        "assert a.AUTO_QUANTIZER_MAPPING['cpullm'].__module__ == 'torch_cpullm.hf'",
        "import torch; from torch_cpullm._autoload import autoload; autoload(); autoload(); import sys;"
        "assert sum(type(f).__module__ == 'torch_cpullm._autoload' for f in sys.meta_path) == 1",
    ):
        fresh.run(code, installed)


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (FORMAT_VERSION + 1, r"format_version 2, .* up to 1: upgrade it with `pip install torch_cpullm --upgrade`"),
        (None, "format_version must be a positive integer, got None"),
        ("1", "format_version must be a positive integer, got '1'"),
        (True, "format_version must be a positive integer, got True"),
        (0, "format_version must be a positive integer, got 0"),
    ],
)
def test_versions(version, text, saved, tmp_path):
    path = copied(saved("llama"), tmp_path / "m")
    edit_config(path, lambda quantization: quantization.update(format_version=version))
    with pytest.raises(ValueError, match=text):
        AutoModelForCausalLM.from_pretrained(path)


# ---- the pieces -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_no_pickle_and_no_code(saved):
    names = {path.name for path in saved("llama").iterdir()} - {"found", "report"}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}


def test_what_is_stored(saved):
    """Row-major codes, two to a byte: read here by hand."""
    with safe_open(saved("llama") / "model.safetensors", framework="pt") as file:
        codes, scales, zeros = (file.get_tensor(f"{UP}.{name}") for name in STORED)
        assert not any(name.startswith("lm_head.") and name.endswith(".weight") for name in file.keys())  # noqa: SIM118
    n, k = 139, 80
    assert (codes.shape, scales.shape, zeros.shape) == ((n, 40), (n, 3), (n, 3))
    flat = torch.stack([codes & 15, codes >> 4], -1).view(n, k).float()
    group = torch.arange(k) // 32
    weight = (flat - zeros.float()[:, group]) * scales.float()[:, group]
    assert torch.equal(weight, optimised("llama").get_submodule(UP).dequantize())


def test_names_of_forms():
    one, two = Form(4, 32, "point", "float16"), Form(8, 32, "none", "float16")
    known = {"model.layers.*.up": one, "model.layers.1.up": two, "lm_head": two}
    assert form_of("model.layers.0.up", known, "model") is one
    assert form_of("model.layers.1.up", known, "model") is two
    assert form_of("layers.7.up", known, "model") is one
    assert form_of("model.lm_head", known, "model") is two
    assert form_of("layers.7.down", known, "model") is None
