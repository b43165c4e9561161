"""The benchmarks of saved models (families, loading, serving) on models of nothing: their rows, files and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from saved_models import optimised
from test_save_reload import with_tokenizer
from transformers import AutoModelForCausalLM

from benchmarks import bench_families, bench_load, bench_serve, machine, report


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_families(tmp_path, capsys):
    out = tmp_path / "families.jsonl"
    assert bench_families.main(["--family", "llama", "mixtral", "--json", str(out)]) == 0
    llama, mixtral = rows_of(out)
    assert (llama["family"], llama["class"], llama["decoder layers"]) == ("llama", "LlamaForCausalLM", "2 one op")
    assert mixtral["decoder layers"].startswith("2 per-linear ops: ")
    for row in (llama, mixtral):
        assert row["logits after reload"] == "the same bits"
        assert 0 < row["saved KB"] < row["float KB"]
    assert "| llama " in report.table("families", tmp_path)
    with pytest.raises(SystemExit):
        bench_families.main(["--family", "lama"])
    assert "unknown family 'lama'" in capsys.readouterr().err


TINY = {
    "model_type": "gpt_neox",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 44,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "rotary_pct": 0.25,
}


def test_a_checkpoint_that_is_loaded(tmp_path, monkeypatch):
    """Shards that transformers reads, of the shape that was asked for; blocks smaller and larger than a tensor."""
    monkeypatch.setitem(bench_load.SHAPES, "tiny", TINY)
    monkeypatch.setattr(bench_load, "BLOCK", 1 << 13)
    config, shapes = bench_load.tensor_sizes("tiny", 3)
    bench_load.write_checkpoint(tmp_path / "m", config, shapes, 4)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.bfloat16
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    query = model.gpt_neox.layers[2].attention.query_key_value.weight.float()
    assert 0.1 < query.std() < 0.15
    assert query[:32].ne(query[32:64]).float().mean() > 0.9
    row = bench_load.measure("quantise", tmp_path / "m", tmp_path / "packed", 2)
    assert row["tok/s"] > 0
    assert row["peak_mib"] >= row["final_mib"]
    assert "first_s" not in bench_load.measure("save", tmp_path / "m", tmp_path / "packed", 2)
    assert bench_load.measure("reload", tmp_path / "m", tmp_path / "packed", 2)["packed_mib"] == row["packed_mib"]


def test_a_disk_that_is_too_small(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"needs 1000000000\.0 GB of disk, and .* GB are free"):
        bench_load.check_space(tmp_path / "not" / "there", 10**18)
    few = type("Usage", (), {"free": 10**9})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_load.shutil, "disk_usage", lambda path: few)
        argv = ["--model", "gpt-neox-20b", "--folder", str(tmp_path / "new"), "--steps", "quantise", "--remove"]
        assert bench_load.main(argv) == 2
    assert "needs 41.1 GB of disk, and 1.0 GB are free" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_serve(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "l3_bytes", lambda: 1 << 18)
    optimised("llama").save_pretrained(tmp_path / "plain")
    path = with_tokenizer(tmp_path / "plain", tmp_path / "m")
    monkeypatch.setattr(bench_serve, "QUESTION", "w3 w4 w5")
    out = tmp_path / "serve.jsonl"
    common = ["--model", str(path), "--repeat", "1", "--threads", "1", "--json", str(out)]
    assert bench_serve.main([*common, "--tokens", "4", "--rounds", "2"]) == 0
    found = rows_of(out)
    assert [row["way"] for row in found] == ["in process", "http"]
    assert all(row["first token, ms"] > 0 and row["ms per token"] >= 0 and row["tokens"] <= 4 for row in found)
    assert found[0]["first token, ms more"] == 0
    assert found[1]["first token, ms more"] > 0
    assert "in process" in report.table("serve", tmp_path)
    (path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no saved model of this package"):
        bench_serve.main(common)
    with pytest.raises(RuntimeError, match="transformers serve did not start"), bench_serve.server(path, 1):
        pass
