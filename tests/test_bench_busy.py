"""The benchmark of a busy neighbour: its summary and its neighbour. No timing is asserted."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_busy


def test_summary_compares_rounds_with_their_quiet_run():
    rows = bench_busy.summary({"quiet": [0.1, 0.2, 0.1], "all": [0.2, 0.4, 0.25]})
    assert [(row["load"], row["tg_tps"], row["pct_of_quiet"]) for row in rows] == [
        ("quiet", 10.0, 100.0),
        ("all", 4.0, 50.0),
    ]


def test_a_neighbour_is_there_and_goes():
    cpu = max(os.sched_getaffinity(0))
    with bench_busy.busy(cpu, 0.5, 0.2):
        pass
    with bench_busy.busy(cpu, 0.0, 0.0):
        pass


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        bench_busy.parse(["--tg", "2"])
    assert "--tg is at least 3" in capsys.readouterr().err
