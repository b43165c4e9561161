"""``cpullm run``: binding, and real programs: their environment, affinity, arguments, exit status and signals."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from torch_cpullm import cli, launch, numa, run
from torch_cpullm.runner import InputError

WIDTH = 100
ROOT = Path(__file__).resolve().parents[1]
OURS = (*launch.USER_VARIABLES, "LD_PRELOAD", "KMP_BLOCKTIME", "MALLOC_CONF")


# ---- binding --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refusing(monkeypatch):
    """A system that binds nothing."""

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    monkeypatch.setattr(numa, "set_memory_node", refuse)


def test_what_the_system_refuses_is_said(refusing):
    plan = run.Plan(frozenset({0, 1}), "2", 0, "node 0")
    assert run.bind(plan, run.Options()) == "cpullm run: 2 threads"
    assert plan.notes == [
        "not bound to CPUs: Operation not permitted",
        "memory not bound to node 0: Operation not permitted",
    ]


def test_what_was_asked_for_must_be_possible(refusing, monkeypatch):
    plan = run.Plan(frozenset({0, 1}), "2", 0, "node 0")
    for options in (run.Options(cores="0-1"), run.Options(node=0)):
        with pytest.raises(InputError, match="refuses to bind to CPUs 0-1: Operation not permitted"):
            run.bind(plan, options)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    with pytest.raises(InputError, match="--memory bind: the system refuses: Operation not permitted"):
        run.bind(plan, run.Options(memory="bind"))


def test_the_line(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: asked.append((pid, cpus)))
    monkeypatch.setattr(numa, "set_memory_node", lambda node, strict: asked.append((node, strict)))
    preload = [Path("/a/libiomp5.so"), Path("/b/libjemalloc.so.2")]
    plan = run.Plan(frozenset(range(32, 48)), "16", 1, "node 1", preload)
    line = run.bind(plan, run.Options(memory="bind"))
    assert line == ("cpullm run: CPUs 32-47 of node 1, 16 threads, memory of node 1, libiomp5.so, libjemalloc.so.2")
    assert len(line) <= WIDTH
    assert asked == [(0, plan.cpus), (1, True)]


@pytest.mark.parametrize(("strict", "word"), [(False, "prefer"), (True, "bind")])
def test_a_programs_memory_comes_from_the_node(strict, word):
    if not Path("/proc/self/numa_maps").exists():
        pytest.skip("a kernel without NUMA")
    code = (
        "import os, sys; from torch_cpullm import numa\n"
        "try: numa.set_memory_node(0, strict=bool(int(sys.argv[1])))\n"
        "except OSError as error: sys.exit(f'refused: {error}')\n"
        "os.execv(sys.executable, [sys.executable, '-c', 'print(open(\"/proc/self/numa_maps\").read())'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(int(strict))], cwd=ROOT, capture_output=True, text=True)
    if done.stderr.startswith("refused"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert all(line.split()[1].split(":")[0].split("=")[0] == word for line in done.stdout.strip().splitlines())


def test_memory_of_no_node_and_on_unknown_processors(monkeypatch):
    with pytest.raises(OSError):
        numa.set_memory_node(1000)
    monkeypatch.setattr(numa.platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="not known how to ask for it on riscv64"):
        numa.set_memory_node(0)


# ---- real programs --------------------------------------------------------------------------------------------------

REPORT = """\
import json, os, sys
names = "OMP_NUM_THREADS LD_PRELOAD KMP_AFFINITY KMP_BLOCKTIME MALLOC_CONF".split()
print(json.dumps({"argv": sys.argv, "pid": os.getpid(), "cpus": sorted(os.sched_getaffinity(0)), "path": sys.path[0],
                  **{name: os.environ.get(name) for name in names}}))
"""


@pytest.fixture
def script(tmp_path):
    """A function that writes a program and returns its path; by default one that reports what it sees."""

    def write(text=REPORT, name="program.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def launcher(*arguments, environment=None, **more):
    """Start ``cpullm run`` in an environment without settings of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.Popen(
        [sys.executable, "-m", "torch_cpullm", "run", *map(str, arguments)],
        env={**inherited, **(environment or {})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def finish(process, text=None):
    out, err = process.communicate(text, timeout=60)
    return process.returncode, out, err


def test_what_a_program_sees(script):
    process = launcher(script(), "--threads", "x", "--", "-m", "--help", "")
    code, out, err = finish(process)
    seen = json.loads(out)
    assert code == 0
    assert seen["argv"][1:] == ["--threads", "x", "--", "-m", "--help", ""]
    assert seen["pid"] == process.pid, "the program replaces the command"
    assert seen["path"] == str(Path(script()).parent)
    assert set(seen["cpus"]) <= launch.cpu_affinity()
    assert 1 <= int(seen["OMP_NUM_THREADS"]) <= len(seen["cpus"])
    assert seen["LD_PRELOAD"] is seen["KMP_AFFINITY"] is seen["MALLOC_CONF"] is None
    assert err.startswith("cpullm run: CPU")
    assert len(err.splitlines()) == 1
    assert len(err) <= WIDTH


def test_options_end_at_a_double_dash(script):
    code, out, _ = finish(launcher("-q", "--threads", 1, "--", script(), "--", "-q"))
    assert (code, json.loads(out)["argv"][1:]) == (0, ["--", "-q"])


def test_quiet_and_named_cpus(script):
    cpu = max(launch.cpu_affinity())
    code, out, err = finish(launcher("--quiet", "--cores", cpu, script()))
    assert (code, err) == (0, "")
    assert json.loads(out)["cpus"] == [cpu]
    assert json.loads(out)["OMP_NUM_THREADS"] == "1"


def test_an_affinity_mask_is_respected(script):
    cpu = max(launch.cpu_affinity())
    limit = {"preexec_fn": lambda: os.sched_setaffinity(0, {cpu})}
    _, out, err = finish(launcher(script(), **limit))
    assert json.loads(out)["cpus"] == [cpu]
    assert f"CPU {cpu}, 1 thread" in err or f"CPU {cpu} of node" in err
    if len(launch.cpu_affinity()) > 1:
        code, _, err = finish(launcher("--cores", min(launch.cpu_affinity()), script(), **limit))
        assert (code, "is not available here; there is" in err) == (2, True)


def test_modules_and_standard_input(script, tmp_path):
    script(name="a_module_of_ours.py")
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    code, out, _ = finish(launcher("-m", "a_module_of_ours", "-m", "--node", environment=path))
    assert (code, json.loads(out)["argv"][1:]) == (0, ["-m", "--node"])
    code, out, _ = finish(launcher("-q", "-", "x", stdin=subprocess.PIPE), "import sys; print(sys.argv)")
    assert (code, out) == (0, "['-', 'x']\n")
    code, _, err = finish(launcher("-m", "no_module_of_this_name"))
    assert (code, "No module named no_module_of_this_name" in err) == (1, True)


def test_a_preloaded_library_is_loaded(script, tmp_path):
    libm = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libm.so" in line)
    shutil.copy(libm, tmp_path / "libtcmalloc.so")  # a harmless library
    text = "print(sum('/libtcmalloc.so' in line for line in open('/proc/self/maps')) > 0)"
    process = launcher("--malloc", "tcmalloc", script(text), environment={"LD_LIBRARY_PATH": str(tmp_path)})
    code, out, err = finish(process)
    assert (code, out) == (0, "True\n")
    assert err.rstrip().endswith(", libtcmalloc.so")


@pytest.mark.parametrize("closed", ["1", "2"])
def test_closed_streams(script, tmp_path, closed):
    program = script(f"open({str(tmp_path / 'ran')!r}, 'w')")
    line = f'exec "$0" -m torch_cpullm run "$1" {closed}>&-'
    subprocess.run(["/bin/sh", "-c", line, sys.executable, program], cwd=ROOT, capture_output=True, check=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("status", [0, 3, 255])
def test_exit_status(script, status):
    assert finish(launcher("-q", script(f"raise SystemExit({status})"))) == (status, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_program(script, number):
    text = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nfinally:\n    print('end')\n"
    process = launcher("-q", script(text))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == -number
    assert (out, "KeyboardInterrupt" in err) == (("end\n", True) if number == signal.SIGINT else ("", False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SCRIPT"),
        (["no/such/program.py"], "error: no such file: no/such/program.py"),
        (["--cores", "7-0", "{script}"], "error: --cores: 7-0 runs backwards"),
        (["--cores", "65000", "{script}"], "error: --cores: CPU 65000 is not available here"),
        (["--node", "4095", "{script}"], "error: --node: node 4095 has no CPU that can be used here"),
        (["--node", "-1", "{script}"], "--node"),
        (["--threads", "0", "{script}"], "--threads"),
        (["--threads", "65000", "{script}"], "error: --threads: 65000 threads, but"),
        (["--malloc", "none", "{script}"], "--malloc"),
        (["--openmp", "llvm", "{script}"], "--openmp"),
        (["--memory", "all", "{script}"], "--memory"),
        (["--no-such-option", "{script}"], "--no-such-option"),
    ],
)
def test_wrong_options_start_nothing(capsys, monkeypatch, script, arguments, message):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: pytest.fail("bound"))
    code = cli.main(["run", *(argument.format(script=script()) for argument in arguments)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_help(capsys):
    assert cli.main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    assert "cpullm run serve.py --port 8000" in out
    assert max(map(len, out.splitlines())) <= WIDTH


def test_this_command_starts_without_torch(script):
    code = "import sys; from torch_cpullm import run; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# ---- intel's runtime ------------------------------------------------------------------------------------------------

UNDER_INTEL = """\
import ctypes, os, torch
from transformers import LlamaConfig, LlamaForCausalLM
import torch_cpullm
from torch_cpullm import launch, layer_program

class Place(ctypes.Structure):
    _fields_ = [(name, ctypes.c_char_p if name in ("file", "name") else ctypes.c_void_p)
                for name in ("file", "base", "name", "at")]

def file_of(name):
    process, place = ctypes.CDLL(None), Place()
    process.dladdr(ctypes.cast(getattr(process, name), ctypes.c_void_p), ctypes.byref(place))
    return os.path.basename(place.file.decode())

torch.set_num_threads(2)
torch.ones(1 << 22).sum()
print(*(file_of(name) for name in ("GOMP_parallel", "GOMP_barrier", "omp_get_max_threads", "omp_get_thread_num")))
print(*(os.path.basename(p) for p in launch.openmp_in_use(launch.openmp_runtimes(), os.environ["LD_PRELOAD"])))
sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = torch_cpullm.optimize(LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval())
ids = model.generate(torch.arange(3, 9)[None], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
print(layer_program.threads_can_wait(), torch.get_num_threads(), torch.ops.cpullm.layer_barriers() > 0, ids.shape[1])
"""


def test_intels_runtime_takes_the_place_of_torchs(script):
    """The functions that torch calls, GOMP_parallel and others, are libiomp5's; torch's own libgomp is never called."""
    if run.find_library("intel", os.environ) is None:
        pytest.skip("libiomp5 is not installed: pip install intel-openmp")
    libraries = os.environ.get("LD_LIBRARY_PATH", "")
    path = {"PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": libraries, "KMP_AFFINITY": "disabled"}
    code, out, err = finish(launcher("-q", "--openmp", "intel", script(UNDER_INTEL), environment=path))
    assert (code, err) == (0, "")
    assert out.splitlines() == [" ".join(["libiomp5.so"] * 4), "libiomp5.so", "True 2 True 14"]
