"""The layer picture of the project, kept true: who may import and include whom, and what no file may hold."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_cpullm

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "torch_cpullm"
CSRC = ROOT / "csrc"

# From the bottom up. A module may import modules of its own layer and of layers below; nothing imports upwards.
LAYERS = [
    [
        "memory",
        "packing",
        "config",
        "launch",
        "numa",
        "library",
        "ops",
        "reference",
        "quant",
        "formats",
    ],  # and _C, which ops loads
    [
        *("linear", "layer", "layer_spec", "layer_reference", "layer_execute", "layer_parts"),
        *(
            "layer_probe",
            "layer_program",
            "layer_cut",
            "layer_graph",
            "layer_stack",
            "layer_decoder",
            "layer_prompt",
            "layer_token",
            "layer_angles",
            "layer_group",
            "layer_watch",
        ),
        *("layer_match", "attention", "kv_cache", "experts", "coverage"),
        *("plan", "share", "checkpoint", "saving", "collective", "following"),
        *("devices", "quality", "calibration", "folding", "calibrated", "layerwise", "sensitivity", "tune_report"),
    ],
    ["swap", "backend", "cqil", "distributed"],  # transforms: model -> model
    ["trial", "distil", "tuning"],  # calibrated weights into a model, by the parts of optimize
    ["formats.gguf", "cqil_repair"],  # they use transforms: a model from a file by optimize, training a grouped model
    ["hf"],
    ["loading", "convert"],
    [
        *(
            "runner",
            "run",
            "bench",
            "doctor",
            "latency",
            "latency_constants",
            "cli",
            "cli_quantize",
            "cli_quality",
            "cli_options",
            "cli_plan",
        ),
        *("__main__", "_autoload"),
    ],
]
TRANSFORMS = ["swap", "backend", "cqil", "distributed"]

# The only modules that name transformers, and the only ones that do so when they are imported.
USE_TRANSFORMERS = {
    "attention",
    "hf",
    "kv_cache",
    "layer_probe",
    "loading",
    "runner",
    "formats.gguf",
    "formats.gguf_hf",
    "formats.gguf_plan",
    "cqil",
    "distributed",
    "latency_constants",
}
LOAD_TRANSFORMERS = {"hf", "kv_cache"}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(name):
    """Index of the layer of a module, by its longest listed prefix."""
    while name:
        for index, names in enumerate(LAYERS):
            if name in names:
                return index
        name = name.rpartition(".")[0]
    return None


def imports(name):
    """(imported name, whether at import time) of every import of a module; our own are named without the package."""
    path = MODULES[name]
    package = ["torch_cpullm", *(name.split(".") if path.name == "__init__.py" and name else name.split(".")[:-1])]
    found = []

    def resolve(module, attribute):
        full = f"{module}.{attribute}"
        ours = full.removeprefix("torch_cpullm.")
        return ours if module.split(".")[0] == "torch_cpullm" and ours in MODULES else module

    def visit(node, top):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.extend((resolve(module, alias.name), top) for alias in node.names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inside)

    visit(ast.parse(path.read_text()), True)
    return [(item.removeprefix("torch_cpullm."), top) for item, top in found]


def own_imports(name):
    return {item for item, _ in imports(name) if item in MODULES and item not in ("", name)}


# ---- Python ---------------------------------------------------------------------------------------------------------


def test_the_import_reader_reads():
    """Relative, absolute, nested and type-checking imports, on modules that have them."""
    assert {"ops", "packing", "linear", "plan", "coverage"} <= own_imports("swap")
    assert {"packing", "ops"} <= own_imports("quant.rtn")
    assert own_imports("packing") == {"library", "memory"}
    assert "runner" in own_imports("cli"), "an import inside of a function"
    assert own_imports("") == set(), "what type checkers see does not count"


def test_every_module_has_its_place():
    assert [name for name in MODULES if name and layer(name) is None] == []


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_nothing_imports_upwards(name):
    upwards = {other for other in own_imports(name) if layer(other) > layer(name)}
    assert upwards == set(), f"{name} must not import {upwards}"


def test_transforms_do_not_import_each_other():
    for name in set(TRANSFORMS) & set(MODULES):
        assert not own_imports(name) & (set(TRANSFORMS) - {name}), name


def test_no_import_cycles():
    rest = {name: own_imports(name) for name in MODULES if name}
    while True:
        free = [name for name, needs in rest.items() if not needs & rest.keys()]
        if not free:
            break
        for name in free:
            del rest[name]
    assert rest == {}


def test_who_may_use_transformers():
    for name in MODULES:
        uses = [(item, top) for item, top in imports(name) if item.split(".")[0] in ("transformers", "accelerate")]
        assert not uses or name in USE_TRANSFORMERS, name
        assert not any(top for _, top in uses) or name in LOAD_TRANSFORMERS, name


def test_who_may_use_torch_distributed():
    for name in MODULES:
        if name not in ("distributed", "collective", "following", "run"):  # run: the launcher of cpullm run --nproc
            assert not [item for item, _ in imports(name) if item.startswith("torch.distributed")], name


def loaded_after(code):
    """Names in sys.modules of a fresh process that ran ``code``."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_after("import torch_cpullm")
    assert "torch_cpullm" in loaded
    assert not loaded & {"torch", "transformers", "torch.distributed", "numpy", "gguf", "typer", "huggingface_hub"}
    assert "torch_cpullm.ops" not in loaded


def test_optimize_works_without_loading_transformers():
    before = loaded_after("import torch")
    code = "import torch, torch_cpullm as t; t.restore(t.optimize(torch.nn.Sequential(torch.nn.Linear(32, 32))))"
    new = loaded_after(code) - before
    assert "torch_cpullm.swap" in new
    assert not {name for name in new if name.split(".")[0] in ("transformers", "gguf", "typer", "accelerate")}
    assert not {name for name in new if name.startswith("torch.distributed")}


def test_public_names():
    assert set(torch_cpullm.__all__) <= set(dir(torch_cpullm))
    for name in torch_cpullm.__all__:
        assert getattr(torch_cpullm, name) is not None
    with pytest.raises(AttributeError, match="module 'torch_cpullm' has no attribute 'optimise'"):
        _ = torch_cpullm.optimise


def test_nothing_loads_pickles_or_runs_text():
    """A checkpoint is data: no module can be made to execute what it reads."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = {"torch.load", "eval", "exec", "compile", "os.system", "np.load", "numpy.load"}
    for name, path in MODULES.items():
        assert not {item.split(".")[0] for item, _ in imports(name)} & modules, name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, f"{name}, line {node.lineno}"
                assert not any(word.arg == "trust_remote_code" for word in node.keywords), f"{name}, line {node.lineno}"
                assert not any(word.arg == "shell" for word in node.keywords), f"{name}, line {node.lineno}"


# ---- C++ ------------------------------------------------------------------------------------------------------------

SOURCES = sorted([*CSRC.rglob("*.cpp"), *CSRC.rglob("*.h")])
C_HEADERS = {"cstdint", "cstring"}  # kernels: no STL, no allocation, no I/O
OF_ONE_FILE = {"dispatch.cpp": {"cpuid.h", "sys/syscall.h", "unistd.h"}}


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def code_of(path):
    """The text without comments and strings."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', " ", path.read_text(), flags=re.S)


def test_sources_are_found():
    names = {path.name for path in SOURCES}
    assert {"ops.cpp", "kernels.h", "ref.cpp", "avx2.cpp", "avx512.cpp", "dispatch.cpp"} <= names


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name == "kernels"], ids=lambda p: p.name)
def test_kernels_know_neither_torch_nor_the_stl(path):
    beside = {p.name for p in path.parent.glob("*.h")}
    allowed = beside | C_HEADERS | OF_ONE_FILE.get(path.name, set())
    if path.name.startswith(("simd_", "dot_", "amx")):
        allowed |= {"immintrin.h"}
    assert set(includes(path)) <= allowed
    code = code_of(path)
    for word in (r"\bstd::", "torch", r"\bat::", r"#\s*pragma\s+omp", "pthread", r"\bnew\b", "malloc", r"\bthrow\b"):
        assert not re.search(word, code), word


def test_only_operators_include_torch():
    for path in SOURCES:
        torch = [name for name in includes(path) if name.startswith(("torch/", "ATen/", "c10/"))]
        if path.parent == CSRC and path.name.startswith("ops"):
            assert all(
                name.startswith(("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/")) for name in torch
            )
        else:
            assert torch == [], path.name
    assert any("torch/csrc/stable/library.h" in includes(path) for path in SOURCES)


def test_the_contract_stands_alone():
    assert includes(CSRC / "kernels" / "kernels.h") == ["cstdint"]


def test_every_operator_has_its_four_places():
    """Schema in C++, wrapper and fake kernel in ops.py, a test by name; for all that return tensors."""
    source = "".join(path.read_text() for path in CSRC.glob("ops*.cpp"))
    schemas = re.findall(r"m\.def\(([^;]*)\);", source)
    joined = [re.sub(r'"\s*"', "", schema).strip().strip('"') for schema in schemas]
    names = [schema.split("(")[0] for schema in joined if "Tensor" in schema.split("->")[1]]
    assert {"linear", "embedding", "dequantize"} <= set(names)
    wrappers = (PACKAGE / "ops.py").read_text()
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for name in names:
        assert f"\ndef {name}(" in wrappers, name
        assert f'register_fake("cpullm::{name}")' in wrappers, name
        assert f"ops.{name}(" in tests or f"cpullm.{name}" in tests, name


# ---- every file -----------------------------------------------------------------------------------------------------

FOLDERS = ("csrc", "torch_cpullm", "tests", "benchmarks", "tutorials")
CODE = sorted(
    [path for folder in FOLDERS for end in ("py", "cpp", "h") for path in (ROOT / folder).rglob(f"*.{end}")]
    + [path for path in ROOT.iterdir() if path.name in ("setup.py", "Makefile", "pyproject.toml")]
)
TEXT = sorted([*CODE, *ROOT.glob("*.md"), *(ROOT / "tutorials").rglob("*.md")])


def test_no_file_outgrows_500_lines():
    assert len(CODE) > 40
    long = {str(path.relative_to(ROOT)): n for path in CODE if (n := len(path.read_text().splitlines())) > 500}
    assert long == {}


def test_nothing_is_left_for_later():
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
    found = [f"{path.relative_to(ROOT)}: {m[0]}" for path in TEXT for m in marks.finditer(path.read_text())]
    assert found == []
    stubs = [
        f"{path.relative_to(ROOT)}, line {node.lineno}"
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc)
    ]
    assert stubs == []
