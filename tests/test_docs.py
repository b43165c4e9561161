"""What the documents say is so: their Python runs; commands, options, files and names exist; links resolve."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import typer.main
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from smollm2 import gguf_path, smollm2

import torch_cpullm
from torch_cpullm.cli import app
from torch_cpullm.config import Settings

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
TUTORIALS = sorted((ROOT / "tutorials").glob("*.md"))
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCS = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *TUTORIALS, *PAGES]
SERVE = ROOT / "tutorials/03_serve.md"  # its blocks want a server
RUNNABLE = [path for path in (README, *TUTORIALS, *PAGES) if path != SERVE and "```python" in path.read_text()]
"""Every python block in them runs, in order, in one namespace per document."""

ignore_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
every_document = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line number of the opening fence, text) of every fenced block of a language."""
    text = text_of(path)
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)
    return [(text[: match.start()].count("\n") + 1, match[1]) for match in found]


def prose(path: Path) -> str:
    """The text without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(path), flags=re.S | re.M)


def inline_code(path: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(path))]


def commands(path: Path) -> list[list[str]]:
    """Words of every command line of the bash blocks, and of inline code that is one."""
    lines = [line for _, block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [code for code in inline_code(path) if re.match(r"(\w+=\S+ )*(cpullm|make|pip|python) ", code)]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words:
            found.append(words)
    return found


# ---- what runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the documents' names are paths: SmolLM2 with 3 of its 30 layers, an adapter, the whole GGUF file.

    A local folder of the name that a document gives goes before the hub, so the blocks run unchanged.
    """
    folder = tmp_path_factory.mktemp("hub")
    model, tokenizer = smollm2()
    model = copy.deepcopy(model)
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    torch_cpullm.restore(model).to(torch.bfloat16).save_pretrained(folder / "HuggingFaceTB/SmolLM2-135M-Instruct")
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, adapter).save_pretrained(folder / "my-adapter")
    tokenizer.save_pretrained(folder / "HuggingFaceTB/SmolLM2-135M-Instruct")
    (folder / gguf_path().name).symlink_to(gguf_path())
    return folder


def run_blocks(path: Path, found: list[tuple[int, str]], namespace: dict[str, Any]) -> None:
    for line, block in found:
        exec(compile("\n" * line + block, str(path), "exec"), namespace)


@ignore_peft
@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.name)
def test_python_blocks_run(path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    torch.set_num_threads(1)  # three layers: on a busy machine two threads would mostly wait for each other
    found = blocks(path, "python")
    assert len(found) >= 2
    run_blocks(path, found, {"__name__": path.stem})
    torch._dynamo.reset()


@ignore_peft
def test_the_tutorial_that_serves(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server runs while its client blocks do, both as the page has them, but for a port that is free."""
    monkeypatch.chdir(hub)
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (save, *talk), namespace = blocks(SERVE, "python"), {"__name__": "serve"}
    run_blocks(SERVE, [save], namespace)
    (serve,) = [words for words in commands(SERVE) if words[:2] == ["transformers", "serve"]]
    (curl,) = [words for words in commands(SERVE) if words[0] == "curl"]
    program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    command = [*program, *(port if word == "8000" else word for word in serve[1:])]
    installed = fresh.install_into(tmp_path / "site")
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=fresh.environment(installed), stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        body, address = json.loads(curl[curl.index("-d") + 1]), curl[1].replace("8000", port)
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert json.loads(answer.read())["choices"][0]["message"]["content"]
        run_blocks(SERVE, [(line, block.replace(":8000/", f":{port}/")) for line, block in talk], namespace)
    finally:
        server.terminate()
        server.wait(30)
        print((tmp_path / "log").read_text())


def wait_for(address: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(address)


# ---- what is named --------------------------------------------------------------------------------------------------


def test_commands_are_found() -> None:
    """The reader of commands reads: without it the tests below would pass on nothing."""
    assert ["make", "demo"] in commands(README)
    assert ["make", "test"] in commands(README)
    assert ["pip", "install", "--no-build-isolation", "."] in commands(README)
    assert ["cpullm", "doctor"] in commands(README)
    assert any(words[:2] == ["cpullm", "bench"] and "--json" in words for path in TUTORIALS for words in commands(path))


@every_document
def test_cpullm_commands_and_options_exist(path: Path) -> None:
    known: Any = typer.main.get_command(app)
    for words in commands(path):
        if words[0] != "cpullm" or words[1:2] == ["--help"]:
            continue
        assert words[1] in known.commands, words
        parameters = known.commands[words[1]].params
        options = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
        given = {word for word in words[2:] if re.match(r"--?[a-z]", word)}
        assert given <= options | {"--help", "-h"}, words
    mentioned = {code for code in inline_code(path) if re.fullmatch(r"--[a-z][a-z-]+", code)}
    everywhere = {name for c in known.commands.values() for p in c.params for name in (*p.opts, *p.secondary_opts)}
    assert mentioned <= everywhere


@every_document
def test_make_targets_and_variables_exist(path: Path) -> None:
    makefile = text_of(ROOT / "Makefile")
    targets = set(" ".join(re.findall(r"^\.PHONY: (.*)$", makefile, re.M)).split())
    for words in commands(path):
        if words[0] == "make":
            for word in words[1:]:
                name, equals, _ = word.partition("=")
                assert re.search(rf"\b{name}\b", makefile) if equals else name in targets, words


@every_document
def test_modules_that_are_run_exist(path: Path) -> None:
    for module in re.findall(r"python -m\s+([\w.]+)", text_of(path)):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file() or module == "pip", module


@every_document
def test_environment_variables_exist(path: Path) -> None:
    code = "".join(text_of(file) for folder in ("csrc", "torch_cpullm") for file in (ROOT / folder).rglob("*.[ch]pp"))
    code += "".join(text_of(file) for file in (ROOT / "torch_cpullm").rglob("*.py")) + text_of(ROOT / "setup.py")
    for name in set(re.findall(r"\bCPULLM_[A-Z_]+\b", text_of(path))):
        assert f'"{name}"' in code, name


def test_every_variable_that_is_read_is_documented() -> None:
    from torch_cpullm.launch import USER_VARIABLES

    assert "CPULLM_ISA" in text_of(README)
    assert USER_VARIABLES[0] in text_of(README)
    read = set(re.findall(r'"(CPULLM_\w+)"', text_of(ROOT / "setup.py")))
    assert read >= {"CPULLM_SANITIZE", "CPULLM_REF_ONLY"}
    beginning = text_of(ROOT / "setup.py").split('"""')[1]
    assert all(name in beginning for name in read), "the README sends its readers there"


@every_document
def test_names_of_the_package_exist(path: Path) -> None:
    for name in set(re.findall(r"\btorch_cpullm((?:\.[A-Za-z_]\w*)+)", text_of(path))):
        value: Any = torch_cpullm
        for part in name[1:].split("."):
            if part == "git":
                break
            if not hasattr(value, part):
                importlib.import_module(f"{value.__name__}.{part}")
            value = getattr(value, part)


@every_document
def test_files_that_are_named_exist(path: Path) -> None:
    names = {file.name for folder in ("csrc", "torch_cpullm", "tests") for file in (ROOT / folder).rglob("*.*")}
    for code in inline_code(path):
        for word in re.findall(r"[\w./*-]+\.(?:py|cpp|h|toml|yaml)\b", code):
            if word.startswith(("*", ".venv")):
                continue
            assert (ROOT / word).is_file() or word in names, word


def anchors(path: Path) -> set[str]:
    """Anchors that a heading gets: lower case, words joined by hyphens."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@every_document
def test_lines_are_short(path: Path) -> None:
    written = re.sub(r"<!-- table:.*?<!-- end -->", "", text_of(path), flags=re.S)
    long = [line for line in written.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert long == []


# ---- what is said ---------------------------------------------------------------------------------------------------


def rows(path: Path, header: str) -> list[list[str]]:
    """Cells of the table whose header line starts so."""
    after = text_of(path).split(f"\n| {header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in after]


def test_the_first_screen() -> None:
    first = "\n".join(text_of(README).splitlines()[:50])
    for part in ("make demo", "make test", "pip install --no-build-isolation .", "torch_cpullm.optimize(model)"):
        assert part in first
    for part in ("Linux x86-64", "Linux aarch64", "Windows, macOS", "https://download.pytorch.org/whl/cpu"):
        assert part in first
    assert "g++ >= 11" in first
    assert "Python >= 3.10" in first


def test_settings_table() -> None:
    table = {name.strip("`"): default.strip("`") for name, default, *_ in rows(README, "field")}
    assert list(table) == [field.name for field in dataclasses.fields(Settings)]
    for field in dataclasses.fields(Settings):
        assert table[field.name].strip('"') == str(field.default), field.name


def test_versions() -> None:
    makefile, project = text_of(ROOT / "Makefile"), text_of(ROOT / "pyproject.toml")
    (pinned,) = re.findall(r"^TORCH \?= torch==(\S+)$", makefile, re.M)
    assert f"torch is pinned to {pinned}" in text_of(README)
    assert f'version = "{torch_cpullm.__version__}"' in project
    assert re.search(r"^## (\S+)$", text_of(ROOT / "CHANGELOG.md"), re.M)[1] == torch_cpullm.__version__
    (setuptools,) = re.findall(r"requires = \[\"setuptools>=(\d+)\"", project)
    assert f"setuptools >= {setuptools}" in text_of(README)
    assert 'requires-python = ">=3.10"' in project


def test_levels() -> None:
    levels = re.findall(r'\{"(\w+)", \w+, use_\w+\}', text_of(ROOT / "csrc/kernels/dispatch.cpp"))
    assert len(levels) == 5
    assert " -> ".join(levels) in text_of(README)
    assert ", ".join(levels) in text_of(README)


def test_families() -> None:
    said = re.sub(r"[^a-z0-9]", "", text_of(README).lower())
    for family in FAMILIES:
        assert family.config.removesuffix("Config").removesuffix("Text").lower() in said, family.config


def test_markers_of_generated_tables() -> None:
    found = re.findall(r"<!-- (table:\w+|end) -->", text_of(README))
    tables = ["kernels", "models", "cqil_quality", "cqil_speed", "quality", "support"]
    assert found == [each for table in tables for each in (f"table:{table}", "end")]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_entry_points_are_the_documented_names() -> None:
    import tomllib

    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    assert project["scripts"] == {"cpullm": "torch_cpullm.cli:main"}
    assert project["entry-points"]["torch_dynamo_backends"] == {"cpullm": "torch_cpullm.backend:cpullm"}
