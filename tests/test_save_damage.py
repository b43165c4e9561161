"""Saving is all or nothing, and nothing damaged loads: full disks, kills, tampered and mutated files."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import fresh
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from saved_models import (
    UP,
    UP_CODES,
    UP_SCALES,
    UP_ZEROS,
    checkpoints,
    copied,
    edit_config,
    logits_of,
    tree,
)
from small_models import llama
from transformers import AutoModelForCausalLM

import torch_cpullm
from torch_cpullm import CpuLlmConfig, saving
from torch_cpullm.checkpoint import FORMAT_VERSION


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


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


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
        (put(UP_SCALES, lambda t: t.float()), rf"{UP_SCALES} is float32, and must be float16 or bfloat16"),
        (put(UP_SCALES, lambda t: t.bfloat16()), None),
        (put(UP_CODES, lambda t: t.to(torch.int8)), rf"{UP_CODES} is int8, and must be uint8"),
        (put(UP_ZEROS, lambda t: t.to(torch.int32)), rf"{UP_ZEROS} is int32, and must be uint8 or float16 or bfloat16"),
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
