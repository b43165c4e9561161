"""benchmarks.bench_experts on sizes of nothing: rows as promised, arguments checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_experts, machine

SMALL = ["--hidden", "64", "--layers", "2", "--experts", "4", "--top-k", "2", "--intermediate", "32", "--steps", "2"]


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "l3_bytes", lambda: 1 << 18)
    assert bench_experts.main([*SMALL, "--threads", "1", "--sym", "--json", str(tmp_path / "new" / "rows.jsonl")]) == 0
    assert torch.get_num_threads() == 1
    found = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
    kinds = [(row["what"], row["engine"]) for row in found]
    assert kinds == [(what, engine) for what in ("experts", "mixture", "model") for engine in ("hf-bf16", "cpullm")]
    for row in found:
        assert row["bench"] == "experts"
        assert row["ms_per_step"] > 0
        assert row["speedup"] > 0
        assert row["steps"] == 2
        weights = 2 * 2 * 3 * 64 * 32  # layers, experts per token, matrices
        assert row["expert_bytes"] == weights * (2 if row["engine"] == "hf-bf16" else 4.5 / 8)
        assert row["gbps"] == pytest.approx(row["expert_bytes"] / row["ms_per_step"] / 1e6)
        assert {"machine", "commit", "date", "bw_before", "bw_after", "foreign_cpu"} <= set(row)
    assert "% BW" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--layers", "0"], ["--top-k", "5"], ["--hidden", "96"], ["--threads", "0"]])
def test_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_experts.parse([*SMALL, *wrong])
    assert "sizes must be at least 1" in capsys.readouterr().err
