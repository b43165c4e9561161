"""save_pretrained and reload of packed models: bit-identical, whole or not at all, and nothing damaged loads."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import fresh
import pytest
import torch
from families import FAMILIES, VOCAB, Family
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from small_models import llama
from transformers import AutoModel, AutoModelForCausalLM

import torch_cpullm
from torch_cpullm import CpuLlmConfig, saving
from torch_cpullm.checkpoint import FORMAT_VERSION, Form, form_of
from torch_cpullm.linear import STORED, PackedLinear
from torch_cpullm.packing import pack
from torch_cpullm.plan import keep_original
from torch_cpullm.quant import quantize_rtn

BY_NAME = {family.name: family for family in FAMILIES}
IDS = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return fresh.install_into(tmp_path_factory.mktemp("installed"))


@cache
def optimised(name: str):
    return torch_cpullm.optimize(BY_NAME[name].build())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family name -> a checkpoint of its optimised model; not to be changed."""
    root = tmp_path_factory.mktemp("saved")

    @cache
    def path(name: str) -> Path:
        optimised(name).save_pretrained(root / name)
        return root / name

    return path


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for name, content in tree(source).items():
        (target / name).write_bytes(content)
    return target


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


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(3, 12).view(1, 9)).logits


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
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "serve", str(path), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)],
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


# ---- all or nothing -------------------------------------------------------------------------------------------------


def test_a_save_replaces_the_last_one_and_keeps_other_files(tmp_path):
    path = tmp_path / "m"
    llama(False).save_pretrained(path, max_shard_size="20KB")
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("mine")
    (path / "more").mkdir()
    (path / "more/notes.txt").write_text("notes")
    mode = path.stat().st_mode
    model = torch_cpullm.optimize(llama(False))
    model.save_pretrained(path)
    assert sorted(tree(path)) == [
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "more/notes.txt"),
        "tokenizer.json",
    ]
    assert (path / "README.md").read_text() == "mine"
    assert path.stat().st_mode == mode
    model.save_pretrained(path, max_shard_size="20KB")
    assert not (path / "model.safetensors").exists()
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(path)), logits_of(model))
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("where", ["new", "existing", "current", "link"])
def test_places_to_save_to(where, tmp_path, monkeypatch):
    path = tmp_path / "deep/er/m"
    if where != "new":
        path.mkdir(parents=True)
        (path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    if where == "current":
        monkeypatch.chdir(path)
        path = Path(".")
    if where == "link":
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    model = torch_cpullm.optimize(llama())
    model.save_pretrained(path)
    assert sorted(entry.name for entry in path.iterdir()) == [
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
    ]
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(path.resolve())), logits_of(model))


def test_where_directories_cannot_change_places(tmp_path, monkeypatch):
    monkeypatch.setattr(saving.ctypes, "CDLL", lambda name: object())
    model = torch_cpullm.optimize(llama())
    model.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits_of(model))


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "m").write_text("x")
    with pytest.raises(FileExistsError, match="is a file, not a directory"):
        torch_cpullm.optimize(llama()).save_pretrained(tmp_path / "m")
    assert (tmp_path / "m").read_text() == "x"


@pytest.mark.parametrize("limit", [0, 1000, 20_000])
def test_a_full_disk_leaves_the_old_checkpoint(limit, tmp_path):
    """Files beyond ``limit`` bytes cannot be written, wherever the save is then."""
    path = tmp_path / "m"
    model = torch_cpullm.optimize(llama(), CpuLlmConfig(sym=True))
    model.save_pretrained(path)
    before = tree(path)
    other = torch_cpullm.optimize(llama())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises((OSError, SafetensorError)):
            other.save_pretrained(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    other.save_pretrained(path)
    assert tree(path) != before


def test_a_full_file_system_leaves_the_old_checkpoint(tmp_path):
    """The same on a file system that really is full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root and the right to mount")
    try:
        model = torch_cpullm.optimize(llama())
        model.save_pretrained(disk / "m")
        before = tree(disk / "m")
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 60_000))
        with pytest.raises((OSError, SafetensorError)):
            model.save_pretrained(disk / "m")
        assert tree(disk / "m") == before
        assert sorted(entry.name for entry in disk.iterdir()) == ["ballast", "m"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_kill_leaves_the_old_checkpoint(saved, tmp_path, installed):
    path = copied(saved("llama"), tmp_path / "m")
    before = tree(path)
    code = """
import sys, time
from transformers import AutoModelForCausalLM
from torch_cpullm import saving
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
saving._keep_others = lambda *args: (print("written", flush=True), time.sleep(60))
model.save_pretrained(sys.argv[1])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env=fresh.environment(installed),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert tree(path) == before
    left = [entry for entry in tmp_path.iterdir() if entry.name != "m"]
    assert [entry.name.startswith(".m.") and entry.name.endswith(".partial") for entry in left] == [True]


# ---- damage ---------------------------------------------------------------------------------------------------------


def edit_config(path: Path, change) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj"
UP_CODES, UP_SCALES, UP_ZEROS = (f"{UP}.{name}" for name in STORED)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


def first(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[0, 0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (put(UP_SCALES, first(float("nan"))), rf"damaged: {UP}: scales must be finite"),
        (put(UP_SCALES, first(float("inf"))), rf"damaged: {UP}: scales must be finite"),
        (put(UP_ZEROS, first(16)), rf"damaged: {UP}: zero points must lie in 0..15, got 16"),
        (put(UP_SCALES, lambda t: t.float()), rf"{UP_SCALES} is F32, and must be BF16 or F16"),
        (put(UP_SCALES, lambda t: t.bfloat16()), None),
        (put(UP_CODES, lambda t: t.to(torch.int8)), rf"{UP_CODES} is I8, and must be U8"),
        (put(UP_ZEROS, lambda t: t.to(torch.int32)), rf"{UP_ZEROS} is I32, and must be BF16 or F16 or U8"),
        (put(UP_ZEROS, lambda t: t.half()), None),
        (put(UP_CODES, lambda t: t[:-1].clone()), "ignore_mismatched_sizes"),
        (put(UP_CODES, lambda t: t[:, :-1].clone()), "ignore_mismatched_sizes"),
        (put(UP_CODES, lambda t: t.reshape(-1)), "ignore_mismatched_sizes"),
        (put(UP_SCALES, lambda t: t[:, :-1].clone()), "ignore_mismatched_sizes"),
        (put("model.norm.weight", lambda t: t[:-1].clone()), "ignore_mismatched_sizes"),
        (lambda tensors: tensors.pop(UP_CODES), "is not whole: config.json speaks of"),
        (lambda tensors: tensors.pop("model.norm.weight"), "is not whole: config.json speaks of"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "is not whole: config.json speaks of"),
        (
            lambda tensors: tensors.update({UP + ".other": tensors.pop(UP_CODES)}),
            rf"lacks, or has in another shape: {UP_CODES}",
        ),
        (
            lambda tensors: tensors.update({"norm": tensors.pop(UP_ZEROS)}),
            rf"lacks, or has in another shape: {UP_ZEROS}",
        ),
    ],
)
def test_tampered_tensors(change, text, saved, tmp_path):
    path = copied(saved("llama"), tmp_path / "m")
    edit_tensors(path, change)
    if text is None:  # transformers turns it into the dtype that the config names: values, not memory, are at stake
        try:
            AutoModelForCausalLM.from_pretrained(path)
        except ValueError as error:
            assert "must" in str(error)  # noqa: PT017
        return
    with pytest.raises((ValueError, RuntimeError), match=text):
        AutoModelForCausalLM.from_pretrained(path)


def test_mismatched_sizes_cannot_be_ignored(saved, tmp_path):
    path = copied(saved("llama"), tmp_path / "m")
    edit_tensors(path, put(UP_CODES, lambda t: t[:-1].clone()))
    with pytest.raises(ValueError, match=rf"lacks, or has in another shape: {UP_CODES}"):
        AutoModelForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True)


def forms(**change):
    return lambda quantization: quantization["modules"]["model.layers.*.mlp.up_proj"].update(change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda quantization: quantization.pop("modules"), "has no `modules`"),
        (lambda quantization: quantization.update(modules=[]), "has no `modules`"),
        (lambda quantization: quantization.update(modules={"x": 1}), "modules: 'x': "),
        (lambda quantization: quantization.update(tensors=None), "speaks of None tensors"),
        (lambda quantization: quantization.update(group_size=7), "group_size must be -1"),
        (forms(bits=3), r"modules: 'model.layers.\*.mlp.up_proj': bits must be 4 or 8, got 3"),
        (forms(bits=8, zeros="none"), "ignore_mismatched_sizes"),
        (forms(bits="4"), "bits must be 4 or 8, got '4'"),
        (forms(group_size=33), "group_size must be -1 .* got 33"),
        (forms(group_size=10**30), "group_size must be below"),
        (forms(group_size=64), "ignore_mismatched_sizes"),
        (forms(zeros="points"), "zeros must be one of none, point, minimum"),
        (forms(zeros="none"), None),
        (forms(scales="float64"), "scales must be one of float16, bfloat16, got 'float64'"),
        (forms(more=1), "unexpected keyword argument 'more'"),
    ],
)
def test_tampered_configs(change, text, saved, tmp_path):
    path = copied(saved("llama"), tmp_path / "m")
    edit_config(path, change)
    if text is None:
        return
    with pytest.raises((ValueError, RuntimeError), match=text):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_truncated_files(keep, saved, tmp_path):
    path = copied(saved("llama"), tmp_path / "m")
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises((ValueError, OSError, SafetensorError), match=r"(?i)whole|header|incomplete|safetensors"):
        AutoModelForCausalLM.from_pretrained(path)


def test_mutated_files(saved, tmp_path):
    """Flipped, cut, inserted and doubled bytes in config and weights: an error, or a model with finite settings."""
    path = copied(saved("llama"), tmp_path / "m")
    whole = tree(path)
    rng = random.Random(5)
    end, tried, errors = time.monotonic() + 25, 0, 0
    while tried < 150 and time.monotonic() < end:
        tried += 1
        for name, content in whole.items():
            (path / name).write_bytes(content)
        name = rng.choice(["config.json", "model.safetensors", "model.safetensors"])
        content = bytearray(whole[name])
        header = 8 + int.from_bytes(content[:8], "little") if name.endswith("safetensors") else len(content)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(min(len(content), header if rng.random() < 0.7 else len(content)))
            kind = rng.randrange(4)
            if kind == 0:
                content[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del content[at : at + rng.randint(1, 40)]
            elif kind == 2:
                content[at:at] = rng.randbytes(rng.randint(1, 8))
            else:
                content[at : at + 1] = bytes([rng.choice(b'0123456789[]{},:"')])
        (path / name).write_bytes(bytes(content))
        try:
            model = AutoModelForCausalLM.from_pretrained(path)
        except (ValueError, RuntimeError, OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
            assert str(error)  # noqa: PT017
            errors += 1
        except Exception as error:  # noqa: BLE001  transformers checks a config's fields with a class of its own
            assert "validat" in type(error).__name__.lower(), repr(error)  # noqa: PT017
            errors += 1
        else:
            assert model.config.quantization_config.format_version == FORMAT_VERSION
    assert tried >= 20
    assert errors >= tried // 3


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
