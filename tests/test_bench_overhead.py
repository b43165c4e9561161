"""benchmarks.bench_overhead: the line through two models, its rows and their table, and bad arguments."""

import json

import pytest

from benchmarks import bench_overhead, report


def test_a_straight_line():
    assert bench_overhead.line([2, 10], [230.0, 270.0]) == (5.0, 220.0)


def test_rows_become_a_table(tmp_path, capsys):
    file = tmp_path / "overhead.jsonl"
    arguments = ["--layers", "1", "3", "--tg", "8", "--rounds", "1", "--threads", "1", "--json", str(file)]
    assert bench_overhead.main(arguments) == 0
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    assert [row["engine"] for row in rows] == ["cpullm", "transformers"]
    assert all(row["us_per_token"] > 0 and row["layers"] == "1 and 3" for row in rows)
    assert "us per layer" in report.table("overhead", tmp_path)
    assert capsys.readouterr().out.count("us_per_layer") == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--layers", "4", "4"], "two ascending numbers, got 4 4"), (["--tg", "7"], "--tg must be at least 8, got 7")],
)
def test_bad_arguments(arguments, text, capsys):
    with pytest.raises(SystemExit):
        bench_overhead.main(arguments)
    assert text in capsys.readouterr().err
