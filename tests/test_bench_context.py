"""Benchmarks of long contexts: caches filled at random, rows, and the picture over depth. No timing is asserted."""

import json
import sys
from pathlib import Path

import pytest
from test_bench_models import TINY

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_context, plot_depth, shapes


def test_both_kinds_of_cache_have_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(shapes.SHAPES, "tinyllama-1.1b", TINY)
    path = tmp_path / "context.jsonl"
    bench_context.main(["--depth", "300", "--tg", "2", "--threads", "2", "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["kv"], row["depth"], row["model"]) for row in rows] == [
        ("bf16", 300, "tinyllama-1.1b"),
        ("int8", 300, "tinyllama-1.1b"),
    ]
    assert all(row["attention_us"] > 0 and row["ms_per_token"] > 0 for row in rows)
    assert "ms_per_token:" in capsys.readouterr().out


def test_wrong_arguments(capsys):
    for argv, says in ((["--depth", "0"], "at least 1"), (["--model", "gpt-j-6b"], "got 'gpt-j-6b'")):
        with pytest.raises(SystemExit):
            bench_context.parse(argv)
        assert says in capsys.readouterr().err


def row(depth, speed, **other):
    known = {"bench": "models", "engine": "cpullm", "group": 32, "form": "sym", "compute": "int8", "pp": 64}
    return known | {"model": "m", "threads": 2, "machine": "PC", "depth": depth, "tg_tps": speed} | other


def test_the_picture_has_engines_that_were_measured_at_two_depths(tmp_path):
    found = plot_depth.panels(
        [row(0, 9.0), row(0, 10.0), row(1024, 8.0), row(512, 7.0, batch=8), row(0, 5.0, group=64)]
    )
    assert found == {"m, 2 threads\nPC": {"cpullm g32 sym int8": {64: 10.0, 1088: 8.0}}}
    plot_depth.draw(found, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rows of one model and engine at two depths"):
        plot_depth.draw({}, tmp_path / "none.png")
