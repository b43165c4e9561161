"""cpullm quantize: any checkpoint to a saved packed model that computes the same, and all of it or nothing."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import warnings

import fresh
import pytest
import torch
from gguf_files import write_model
from packed_files import FAMILIES, Recipe, write
from safetensors.torch import load_file, save_file
from saved_models import logits, tree
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_cpullm
from torch_cpullm import CpuLlmConfig, cli, runner
from torch_cpullm.convert import convert
from torch_cpullm.linear import ORDER

SOURCES = {
    "gptq": Recipe("gptq", order=True),
    "gptq_v2": Recipe("gptq_v2", bits=8, group_size=-1, scales=torch.bfloat16),
    "awq": Recipe("awq", sym=False, family="qwen2"),
    "compressed": Recipe("pack-quantized", sym=False, order=True),
}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr("torch_cpullm.runner.quiet_libraries", lambda debug: None)  # for the whole process
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """name -> where a checkpoint of this kind is; not to be changed."""
    root = tmp_path_factory.mktemp("sources")
    for name, recipe in SOURCES.items():
        write(root / name, recipe, 40 if name == "awq" else None)
    FAMILIES["llama"].build(torch.bfloat16).save_pretrained(root / "float")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_model(root / "gguf", "llama")
    torch_cpullm.load(root / "gptq")[0].save_pretrained(root / "ours")
    return lambda name: root / name


def reloaded(path):
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("name", [*SOURCES, "float", "ours", "gguf"])
def test_converts_and_reloads_bit_for_bit(name, source, tmp_path, capsys):
    want, tokenizer = torch_cpullm.load(source(name))
    target = tmp_path / "deep/m"
    assert cli.main(["quantize", str(source(name)), str(target)]) == 0
    assert " MB of weights as " in capsys.readouterr().out
    model = reloaded(target)
    assert model.dtype == want.dtype
    assert torch.equal(logits(model), logits(want))
    states = [found.state_dict() for found in (model, want)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert [entry.name for entry in target.parent.iterdir()] == ["m"]
    if tokenizer is not None:
        text = "some text"
        assert AutoTokenizer.from_pretrained(target)(text).input_ids == tokenizer(text).input_ids
    model.save_pretrained(tmp_path / "again")
    ours = [tree(path)["model.safetensors"] for path in (target, tmp_path / "again")]
    assert ours[0] == ours[1]


@pytest.mark.parametrize("name", ["gptq", "ours"])
def test_the_command_line_runs_them_as_they_are(name, source):
    want, _ = torch_cpullm.load(source(name))
    loaded = runner.load_int4(source(name), tokenizer=False)
    assert torch.equal(logits(loaded.model), logits(want))
    assert (loaded.label, loaded.model_bytes) == ("INT4", runner.count(want)[0])
    plain = runner.load_bf16(source(name), loaded)
    assert plain.model.dtype == torch.bfloat16
    assert torch.equal(plain.model.lm_head.weight, torch_cpullm.restore(want).lm_head.weight.bfloat16())


def test_options(source, tmp_path, capsys):
    options = [
        "--bits",
        "8",
        "--group-size",
        "64",
        "--head-bits",
        "none",
        "--exclude",
        "down_proj",
        "--compute",
        "fp32",
    ]
    assert cli.main(["quantize", str(source("float")), str(tmp_path / "m"), *options, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    settings = reloaded(tmp_path / "m")._cpullm_settings
    want = CpuLlmConfig(8, 64, compute="fp32", head_bits=None, modules_to_not_convert=["down_proj"])
    assert settings.same_as(want)
    assert cli.main(["quantize", str(source("awq")), str(tmp_path / "m"), "--head-bits", "4", "--quiet"]) == 0
    rows = torch_cpullm.report(reloaded(tmp_path / "m")).rows
    assert {row.bits for row in rows} == {4}


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("gptq", ["--bits", "4"], "--bits does not apply to gptq: its weights are quantised already (gptq)"),
        ("gptq", ["--no-sym"], "--sym does not apply to gptq"),
        ("compressed", ["--group-size", "64"], "--group-size does not apply to compressed"),
        ("gguf", ["--head-bits", "4"], "--head-bits does not apply to gguf: its weights are quantised already (gguf)"),
        ("ours", ["--exclude", "x"], "--exclude does not apply to ours: its weights are quantised already (cpullm)"),
        ("float", ["--head-bits", "3"], "--head-bits must be 8, 4 or none, got '3'"),
        ("float", ["--bits", "3"], "must be 4 or 8, got 3"),
        ("float", ["--group-size", "33"], "must be a positive multiple of 32"),
        ("nowhere", [], "SRC nowhere: no such file or directory"),
    ],
)
def test_wrong_arguments(name, options, text, source, tmp_path, capsys):
    path = name if name == "nowhere" else str(source(name))
    assert cli.main(["quantize", path, str(tmp_path / "m"), *options]) == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_never_replaces_its_source(source, tmp_path, monkeypatch):
    for target in (source("float"), source("float").parent):
        with pytest.raises(ValueError, match="is where the source is"):
            convert(source("float"), target)
    monkeypatch.chdir(source("float"))
    with pytest.raises(ValueError, match="is where the source is"):
        convert(source("float"), ".")
    (tmp_path / "m").write_text("x")
    with pytest.raises(FileExistsError, match="is a file, not a directory"):
        convert(source("float"), tmp_path / "m")


def test_what_comes_along(source, tmp_path):
    """Tokenizer, chat template, licence: byte for byte. No code, no weights, and nothing of an older checkpoint."""
    path, target = tmp_path / "source", tmp_path / "m"
    write(path, SOURCES["gptq"])
    along = (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "chat_template.jinja",
        "LICENSE",
        "spm.model",
    )
    code = ("modeling_mine.py", "tokenization_mine.py")
    for name in (*along, *code, "pytorch_model.bin", "quantize_config.json", "notes.txt"):
        (path / name).write_text(name)
    FAMILIES["llama"].build().save_pretrained(target, max_shard_size="40KB")
    (target / "notes.md").write_text("mine")
    convert(path, target)
    want = {*along, "README.md", "config.json", "generation_config.json", "model.safetensors", "notes.md"}
    assert tree(target).keys() == want
    assert all((target / name).read_text() == name for name in along)


@pytest.mark.parametrize("limit", [0, 3000, 60_000])
def test_a_full_disk_leaves_the_old_checkpoint(limit, source, tmp_path):
    convert(source("awq"), tmp_path / "m")
    before, origin = tree(tmp_path / "m"), tree(source("gptq"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(Exception, match=r"(?i)file too large|I/O error|os error"):
            convert(source("gptq"), tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path / "m") == before
    assert tree(source("gptq")) == origin
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


KILLED = """
import sys, time
from torch_cpullm import convert, saving
def stop(*args, **kwargs):
    print("now", flush=True)
    time.sleep(60)
if sys.argv[3] == "copy":
    convert.shutil.copyfile = stop
else:
    saving.saved_tensors = stop
convert.convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("when", ["write", "copy"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_leaves_no_half_checkpoint(when, existing, source, tmp_path):
    installed = fresh.install_into(tmp_path / "installed")
    path, target = tmp_path / "source", tmp_path / "place/m"
    write(path, SOURCES["gptq"])
    (path / "vocab.json").write_text("{}")
    if existing:
        convert(source("awq"), target)
    before = tree(target) if existing else {}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), str(target), when],
        env=fresh.environment(installed),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tree(target) if target.exists() else {}) == before
    for left in target.parent.iterdir():
        assert left == target or (left.name.startswith(".") and left.name.endswith(".partial"))
        if when == "write" and left != target:
            with pytest.raises((OSError, ValueError), match=r"partial"):
                reloaded(left)


MEMORY = """
import sys, threading, time
import torch
from torch_cpullm import convert, hf
from torch_cpullm.runner import memory_bytes
torch.set_num_threads(1)
convert.convert(sys.argv[3], sys.argv[3] + "-packed")  # imports what it needs
peak, start = [0], memory_bytes()[1]
def watch():
    while True:
        peak[0] = max(peak[0], memory_bytes()[1])
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
report = convert.convert(sys.argv[1], sys.argv[2])
print((peak[0] - start) / 1e6, report.bytes_after / 1e6)
"""


@pytest.mark.parametrize("kind", ["float", "gptq"])
def test_memory_holds_the_packed_model_and_little_more(kind, tmp_path):
    """Not the source, which is mapped, and not a second copy to save."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=12))
    model.save_pretrained(tmp_path / "source")
    if kind == "gptq":
        state = load_file(tmp_path / "source/model.safetensors")
        for name in [name for name in state if "_proj.weight" in name]:
            n, k = state.pop(name).shape
            module = name.removesuffix(".weight")
            state[f"{module}.qweight"] = torch.randint(-(2**31), 2**31 - 1, (k // 8, n), dtype=torch.int32)
            state[f"{module}.qzeros"] = torch.full((k // 128, n // 8), 0x77777777, dtype=torch.int32)
            state[f"{module}.scales"] = torch.full((k // 128, n), 0.01, dtype=torch.float16)
        save_file(state, tmp_path / "source/model.safetensors", {"format": "pt"})
        config = json.loads((tmp_path / "source/config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
        (tmp_path / "source/config.json").write_text(json.dumps(config))
    FAMILIES["llama"].build().save_pretrained(tmp_path / "small")
    installed = fresh.install_into(tmp_path / "installed")
    paths = tmp_path / "source", tmp_path / "m", tmp_path / "small"
    peak, packed = map(float, fresh.run(MEMORY, installed, *paths).stdout.split())
    floats = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    assert floats > 200 > 40 > packed
    in_flight = 4 * 768 * 3072 * 4 / 1e6  # transformers reads with 4 threads, each a float matrix ahead of the packing
    assert peak < 2 * packed + 40 + in_flight < floats, (peak, packed)


# ---- the order of inputs --------------------------------------------------------------------------------------------


def test_state_dicts_hold_the_order(source):
    model, other = (torch_cpullm.load(source("gptq"))[0] for _ in range(2))
    state = model.state_dict()
    assert state[f"{UP}.{ORDER}"].dtype == torch.int32
    target = other.get_submodule(UP)
    target.order.copy_(target.order.flip(0))
    other.load_state_dict(state)
    assert torch.equal(target.order, model.get_submodule(UP).order)
    assert torch.equal(logits(other), logits(model))
    for change, text in (
        (lambda order: order.long(), "must be int32"),
        (lambda order: order[:-1], r"must be int32 \[80\]"),
        (lambda order: order * 0, "must hold every input 0..79 once"),
        (lambda order: order + 1, "must hold every input 0..79 once"),
    ):
        with pytest.raises(RuntimeError, match=f"{UP}: {ORDER} {text}"):
            other.load_state_dict({**state, f"{UP}.{ORDER}": change(state[f"{UP}.{ORDER}"])})
    with pytest.raises(RuntimeError, match=f"{ORDER} is missing"):
        other.load_state_dict({name: value for name, value in state.items() if name != f"{UP}.{ORDER}"})
    plain = torch_cpullm.optimize(FAMILIES["llama"].build(), CpuLlmConfig(sym=True))
    with pytest.raises(RuntimeError, match=f"{ORDER} is not expected"):
        plain.load_state_dict(state)


def test_a_damaged_order_does_not_load(source, tmp_path):
    convert(source("gptq"), tmp_path / "m")
    state = load_file(tmp_path / "m/model.safetensors")
    state[f"{UP}.{ORDER}"][0] = 2**31 - 1
    save_file(state, tmp_path / "m/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"damaged: {UP}: {ORDER} must hold every input 0..79 once"):
        reloaded(tmp_path / "m")
