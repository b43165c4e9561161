"""Whole-model benchmarks: arguments, engines that are not there, rows. No peer is needed and no timing is asserted."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # `pytest` alone does not add it, `python -m pytest` does

from benchmarks import bench_models, gguf_shapes, machine, peers, report, shapes, turns  # noqa: E402

TINY = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A shape that loads at once; nothing is installed and nothing is written outside tmp_path."""
    monkeypatch.setitem(shapes.SHAPES, "tinyllama-1.1b", TINY)
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    monkeypatch.setattr(peers, "TORCHAO", tmp_path / "torchao")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)


def labels(text, *argv):
    args, _ = bench_models.parse(["--threads", "2", *argv])
    return [choice.label for choice in bench_models.choices(text, args)]


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_engines_carry_settings():
    assert labels("cpullm,llama.cpp,openvino,hf-bf16,torchao") == [
        "cpullm g32 zero point int8", "llama.cpp g32 Q4_0", "llama.cpp Q4_K_M", "openvino g128 sym", "hf-bf16",
        "torchao g32",
    ]  # fmt: skip
    assert labels("cpullm:g32:sym,cpullm:g128:fp32,llama.cpp:q4_0,torchao:g64,cpullm:g32:sym") == [
        "cpullm g32 sym int8", "cpullm g128 zero point fp32", "llama.cpp g32 Q4_0", "torchao g64",
    ]  # fmt: skip
    assert labels("cpullm,cpullm:zero", "--sym", "--group", "64") == [
        "cpullm g64 sym int8",
        "cpullm g64 zero point int8",
    ]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--engines", "vllm"], "'vllm' is not one of cpullm, llama.cpp, openvino, hf-bf16, torchao"),
        (["--engines", "hf-bf16:g32"], "hf-bf16 has no setting 'g32'"),
        (["--engines", "cpullm:q4_0"], "cpullm has no setting 'q4_0'"),
        (["--engines", "openvino:g48"], "openvino has no setting 'g48'"),
        (["--pp", "0"], "--pp must be at least 1, got 0"),
        (["--tg", "1"], "--tg must be at least 2, got 1"),
        (["--turn", "1"], "--turn must be at least 2, got 1"),
        (["--depth", "-1"], "--depth must be at least 0, got -1"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--model", "/nowhere/model"], "no such file or directory"),
    ],
)
def test_wrong_arguments_end_with_a_message(argv, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_models.parse(argv)
    assert says in capsys.readouterr().err


def test_every_shape_of_the_issue_is_known():
    billions = {name: round(shapes.parameters(name) / 1e9, 1) for name in shapes.SHAPES}
    assert billions == {"tinyllama-1.1b": 1.1, "llama-2-7b": 6.7, "gpt-j-6b": 6.1, "gpt-neox-20b": 20.6}


# ---- engines that cannot run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["llama.cpp:q4_0", "llama.cpp:q4_k_m", "openvino", "torchao"])
def test_an_engine_that_is_not_installed_is_a_dash(engine, tiny, capsys):
    assert bench_models.main(["--engines", engine, "--threads", "1"]) == 1
    captured = capsys.readouterr()
    (only,) = captured.out.splitlines()
    assert only.startswith(engine.partition(":")[0])
    assert only.split()[-5:] == ["-", "(not", "installed:", "make", "peers)"]
    assert captured.err == ""


def test_a_model_beyond_memory_is_a_dash(monkeypatch, capsys):
    monkeypatch.setattr(machine, "available_bytes", lambda: 1 << 30)
    assert bench_models.main(["--model", "gpt-neox-20b", "--engines", "hf-bf16", "--threads", "1"]) == 1
    assert "(needs about 44 GiB of memory)" in capsys.readouterr().out


def test_a_conversion_beyond_memory_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "MODELS", tmp_path)
    with pytest.raises(peers.Missing, match="its conversion needs about 17 GiB of memory"):
        peers.prepare(
            "openvino", "llama-2-7b", form="sym", group=128, threads=1,
            weights=bench_models.weights_of("llama-2-7b"), available=16 << 30,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_an_engine_that_fails_is_a_dash(monkeypatch, capfd):
    monkeypatch.setitem(shapes.SHAPES, "not-there", TINY)  # the engine's process does not know it
    assert bench_models.main(["--model", "not-there", "--engines", "hf-bf16", "--threads", "1"]) == 1
    out, err = capfd.readouterr()
    assert out.startswith("hf-bf16")
    assert "(ValueError: --model not-there: no such file or directory)" in out
    assert "Traceback" not in err


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_prints_and_appends_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "t", TINY)
    folder = tmp_path / "my-model"
    shapes.random_model("t", torch.bfloat16).save_pretrained(folder)
    file = tmp_path / "new" / "models.jsonl"
    argv = ["--model", str(folder), "--engines", "cpullm:g32:sym,hf-bf16", "--pp", "8", "--tg", "9", "--threads", "1"]
    argv += ["--turn", "3", "--rounds", "2", "--depth", "4", "--batch", "2", "--json", str(file)]
    assert bench_models.main(argv) == 0
    ours, theirs = (json.loads(line) for line in file.read_text().splitlines())
    wanted = "engine model bits pp_tps tg_tps ttft_s ms_per_token gbps pct_bw rss_peak_gib threads foreign_cpu load_s"
    wanted += " tg_ratio tg_ratio_q1 tg_ratio_q3 pp_ratio pp_ratio_q1 pp_ratio_q3 ratio_to bw_before bw_after version"
    assert set(wanted.split()) <= ours.keys() == theirs.keys()
    assert (ours["turns"], ours["turn"], theirs["ratio_to"]) == (4, 3, "cpullm g32 sym int8")
    assert 0 < ours["bw_min"] <= ours["bw_max"]
    assert ours["unstable"]  # two rounds are no quartiles
    assert (ours["engine"], ours["group"], ours["form"], theirs["engine"]) == ("cpullm", 32, "sym", "hf-bf16")
    assert (ours["model"], ours["depth"], ours["batch"], ours["rounds"]) == ("my-model", 4, 2, 2)
    assert 4.5 <= ours["bits"] < 8
    assert theirs["bits"] == 16
    assert ours["tg_tps"] == pytest.approx(2000 / ours["ms_per_token"])
    out = capsys.readouterr().out
    assert "pp8 tg9 after 4 tokens, batch 2" in out
    assert max(map(len, out.splitlines()[2:])) <= 120
    assert "pp8, tg9, depth 4, batch 2" in report.table("models", file.parent)


class Fake:
    """An engine that decodes a token in ``step`` seconds and fails where it is told to; its ways take turns."""

    def __init__(self, log, name, step=1.0, fails="", ways=("",)):
        self.choice, self.log, self.step, self.fails, self.names = bench_models.Choice(name), log, step, fails, ways
        self.prompts, self.decodes, self.rss_peak_gib = [], [], 0.5
        self.loaded, self.ways = {"load_s": 1.0, "weight_bytes": 30e9, "weights": 60e9, "version": "1"}, len(ways)

    def _say(self, what):
        self.log.append(f"{self.choice.name} {what}")
        if self.log.count(self.log[-1]) > 1 and what == self.fails:
            raise peers.Missing("ended with status -9")

    def start(self):
        self._say("start")

    def prompt(self, round_):
        self._say("prompt")
        return [turns.Turn(round_, way, len(self.log), [10 * self.step]) for way in self.names]

    def decode(self, round_, tokens):
        self._say(str(tokens))
        way = self.names[len(self.decodes) % self.ways]
        return turns.Turn(round_, way, len(self.log), [9.0] + [self.step] * (tokens - 1))

    def end(self):
        self._say("end")

    def close(self):
        self._say("close")


@pytest.fixture
def quick(monkeypatch):
    """Two turns of 3 and 4 tokens in each of two rounds; readings of 40, 30, 50, 40, 30, .. GB/s."""
    monkeypatch.setattr(bench_models, "SETTLE_S", 0.0)
    readings = itertools.cycle([40.0, 30.0, 50.0])
    monkeypatch.setattr(machine.Memory, "__init__", lambda self, size: None)
    monkeypatch.setattr(machine.Memory, "read_gbps", lambda self, threads: next(readings))
    return bench_models.parse(["--rounds", "2", "--threads", "1", "--tg", "8", "--turn", "3"])[0]


ROUND = "a prompt, b prompt, a 3, b 3, a 4, b 4, a end, b end"
ALONE = "{0} start, {0} prompt, {0} 3, {0} 4, {0} end, {0} close"


@pytest.mark.parametrize(
    ("together", "wanted"),
    [(True, f"a start, b start, {ROUND}, {ROUND}"), (False, ", ".join([ALONE.format(x) for x in "abab"]))],
)
def test_engines_take_turns(together, wanted, quick):
    log = []
    running = [Fake(log, "a"), Fake(log, "b")]
    readings = bench_models.measure(running, quick, together)
    assert ", ".join(log) == wanted
    assert len(readings) == 2 * (5 if together else 6)  # before the first turn and after every turn
    assert [turn.gbps for turn in running[0].decodes[:2]] == [40, 50]  # the larger of both sides


@pytest.mark.parametrize(
    ("together", "fails", "wanted"),
    [
        (True, "prompt", f"a start, b start, {ROUND}, a prompt, b prompt, a 3, a 4, a end"),
        (True, "4", f"a start, b start, {ROUND}, a prompt, b prompt, a 3, b 3, a 4, b 4, a end"),
        (True, "end", f"a start, b start, {ROUND}, {ROUND}"),
        (False, "start", ", ".join([ALONE.format("a"), ALONE.format("b"), ALONE.format("a"), "b start, b close"])),
    ],
)
def test_an_engine_that_fails_leaves_and_the_others_go_on(together, fails, wanted, quick, capsys):
    log = []
    running = [Fake(log, "a"), Fake(log, "b", fails=fails)]
    bench_models.measure(running, quick, together)
    assert ", ".join(log) == wanted
    assert [fake.choice.name for fake in running] == ["a"]
    assert capsys.readouterr().out.endswith("-  (ended with status -9)\n")


def test_a_row_of_turns(quick):
    log = []
    running = [Fake(log, "a", step=1.0), Fake(log, "b", step=0.5)]
    readings = bench_models.measure(running, quick, True)
    first, second = (bench_models.summarise(fake, running[0], quick, readings) for fake in running)
    assert (first["tg_ratio"], second["tg_ratio"], second["pp_ratio"]) == (1.0, 2.0, 2.0)
    assert (second["tg_ratio_q1"], second["tg_ratio_q3"], second["turns"]) == (2.0, 2.0, 4)
    assert second["tg_tps"] == 2.0  # the cold first token of a turn is left out
    assert (second["pp_tps"], second["ttft_s"]) == (512 / 5, 5)
    assert second["gbps"] == 60.0
    assert second["pct_bw"] == 135.0  # median of 60 GB/s over 50, 40, 40 and 50, the larger readings beside its turns
    assert (second["bw_before"], second["bw_min"], second["bw_max"]) == (40.0, 30.0, 50.0)
    assert second["foreign_cpu"] == 0.0
    assert second["ratio_to"] == "a"
    assert "flash_attention" not in second


def test_a_driver_speaks_with_an_engine_of_two_ways(monkeypatch):
    args, (choice,) = bench_models.parse(["--threads", "1", "--engines", "hf-bf16", "--depth", "5", "--tg", "2"])
    engine, told = bench_models.Engine(choice, args), []
    answers = iter([
        {"times": [8.0], "way": "on", "own_cpu_s": 0.0, "rss_peak_gib": 1.5},
        {"times": [9.0], "way": "off", "own_cpu_s": 0.0, "rss_peak_gib": 2.5},  # with a second cache
        {"times": [1.0, 2.0], "way": "on", "own_cpu_s": 0.0, "rss_peak_gib": 2.5},
    ])  # fmt: skip
    monkeypatch.setattr(engine, "_tell", told.append)
    monkeypatch.setattr(engine, "_answer", lambda: next(answers))
    engine.ways = 2
    first, second = engine.prompt(3)
    turn = engine.decode(3, 2)
    engine.end()
    asked = {"pp": 512, "tg": 2, "depth": 5, "batch": 1, "room": 5 + 512 + 4, "seed": 3}
    assert told == [asked, {"go": 1}, {"go": 2}, {"go": 0}]
    assert (first.way, second.seconds, turn.times, turn.round) == ("on", 9.0, [1.0, 2.0], 3)
    assert engine.rss_peak_gib == 1.5


def test_the_faster_way_of_an_engine_counts(quick):
    log = []
    slow = Fake(log, "a", ways=("on", "off"))
    bench_models.measure([slow], quick, True)
    assert log[:7] == ["a start", "a prompt", "a 3", "a 3", "a 4", "a 4", "a end"]
    slow.decodes = [replace(turn, times=[2.0 if turn.way == "on" else 1.0]) for turn in slow.decodes]
    slow.prompts = [replace(turn, times=[3.0 if turn.way == "on" else 4.0]) for turn in slow.prompts]
    row = bench_models.summarise(slow, slow, quick, [40.0])
    assert (row["tg_tps"], row["ttft_s"], row["turns"]) == (1.0, 3.0, 4)
    assert row["flash_attention"] == "pp on, tg off"


def test_depth_is_shown_and_does_not_hide_another(tmp_path):
    row = {
        "machine": "Some CPU", "commit": "0123", "date": "2030-01-02", "model": "tiny", "engine": "llama.cpp",
        "group": 32, "form": "Q4_0", "compute": None, "threads": 2, "pp": 512, "tg": 64, "pp_tps": 700.0,
        "tg_tps": 88.8, "ttft_s": 0.73, "ms_per_token": 11.26, "rss_peak_gib": 0.9, "foreign_cpu": 0.0,
    }  # fmt: skip
    both = [row, {**row, "depth": 1024, "batch": 1}]
    (tmp_path / "models.jsonl").write_text("".join(json.dumps(r) + "\n" for r in both))
    table = report.table("models", tmp_path)
    assert "llama.cpp (g32, Q4_0)" in table
    assert table.count("pp512, tg64 ") == table.count("pp512, tg64, depth 1024 ") == 1


# ---- GGUF files of a shape ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "bits"), [("Q4_0", 4.5), ("Q4_K_M", 4.5)])
def test_a_shapes_gguf_file_is_whole(form, bits, tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "t", TINY)
    path = tmp_path / "t.gguf"
    gguf_shapes.write("t", form, path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 2 * (7 + 2) + 3
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [512, 256]
    for tensor in tensors.values():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == tuple(reversed(tensor.shape))
        assert np.isfinite(values).all()
        assert 0 < np.abs(values).max() <= 1
    query = tensors["blk.0.attn_q.weight"]
    assert 8 * query.n_bytes / query.n_elements == bits
    assert tensors["output.weight"].tensor_type == gguf.GGMLQuantizationType.Q6_K


def test_types_follow_llama_quantize():
    kinds = [gguf_shapes.kind_of("Q4_K_M", "ffn_down", layer, 22).name for layer in range(22)]
    assert [layer for layer, kind in enumerate(kinds) if kind == "Q6_K"] == [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]
    assert gguf_shapes.kind_of("Q4_K_M", "attn_qkv").name == "Q5_K"


def test_a_shape_that_llamacpp_has_not_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"llama\.cpp has no gptj models"):
        gguf_shapes.write("gpt-j-6b", "Q4_0", tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
