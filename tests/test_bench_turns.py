"""Engines that take turns: how turns are cut, paired and judged, and how an engine's process waits between them."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import engines, report, rows, turns


def turn(when, seconds, **changes):
    return turns.Turn(**{"round": 0, "way": "", "when": when, "times": [9.0, seconds], **changes})


# ---- turns and their ratios -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "size", "wanted"),
    [(63, 8, [9] * 7), (7, 3, [3, 4]), (1, 8, [1]), (7, 8, [7]), (16, 8, [8, 8])],
)
def test_steps_are_cut_into_turns(steps, size, wanted):
    assert turns.sizes(steps, size) == wanted


def test_the_first_token_of_a_turn_does_not_count_unless_it_is_alone():
    assert turn(0, 2.0).seconds == 2.0
    assert turn(0, 2.0, times=[9.0, 1.0, 5.0, 2.0]).seconds == 2.0
    assert turn(0, 2.0, times=[9.0]).seconds == 9.0


def test_a_drifting_machine_leaves_a_ratio_alone():
    theirs = [turn(when, 10.0 + when) for when in range(0, 40, 4)]
    mine = [turn(when, (10.0 + when) / 2) for when in range(1, 36, 4)]
    assert turns.paired(mine, theirs) == pytest.approx([2.0] * len(mine))
    assert turns.paired(theirs[1:-1], theirs) == pytest.approx([1.0] * 8)


def test_turns_are_paired_with_the_nearest_at_the_ends_and_never_with_themselves():
    theirs = [turn(1, 4.0), turn(3, 8.0)]
    assert turns.paired([turn(0, 1.0), turn(2, 1.0), turn(4, 1.0)], theirs) == [4.0, 6.0, 8.0]
    assert turns.paired(theirs, theirs) == [2.0, 0.5]
    assert turns.paired(theirs[:1], theirs[:1]) == []


def test_quartiles():
    assert turns.quartiles("r", [3.0, 1.0, 2.0, 5.0, 4.0]) == {"r": 3.0, "r_q1": 2.0, "r_q3": 4.0}
    assert turns.quartiles("r", [2.0]) == {"r": 2.0, "r_q1": 2.0, "r_q3": 2.0}
    assert turns.quartiles("r", []) == {"r": None, "r_q1": None, "r_q3": None}


def test_ways_are_compared_by_time_and_the_bandwidth_they_met():
    on = [turn(0, 1.0, way="on", gbps=50.0), turn(1, 1.0, way="on", gbps=50.0)]
    off = [turn(0, 1.2, way="off", gbps=25.0), turn(1, 1.2, way="off", gbps=25.0)]
    assert turns.best_way(on + off) == off
    assert turns.best_way([turn(0, 2.0, way="on"), turn(0, 1.0, way="off")])[0].way == "off"


def test_other_processes_are_those_of_the_worst_round():
    found = [
        turn(0, 1.0, wall_s=1.0, foreign_s=-0.1), turn(0, 1.0, wall_s=1.0, foreign_s=0.3),
        turn(0, 1.0, round=1, wall_s=1.0, foreign_s=-0.2),
    ]  # fmt: skip
    assert turns.foreign_cores(found) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("low", "high", "pairs", "uncertain"),
    [(0.9, 1.1, 28, True), (0.92, 1.08, 28, False), (0.92, 1.08, 14, True), (1.0, 1.0, 2, True), (None, None, 3, True)],
)
def test_a_median_is_uncertain_by_the_quartiles_and_the_pairs(low, high, pairs, uncertain):
    middle = low and 1.0
    row = {"tg_ratio": middle, "tg_ratio_q1": low, "tg_ratio_q3": high, "turns": pairs, "rounds": 1}
    assert rows.uncertain(row, "tg_ratio") is uncertain
    assert rows.uncertain(row, "pp_ratio") is False  # a row from before there were ratios


def test_old_and_new_rows_stand_in_one_table(tmp_path):
    old = {
        "machine": "Some CPU", "commit": "0123", "date": "2030-01-02", "model": "tiny", "engine": "hf-bf16",
        "group": None, "form": None, "compute": None, "threads": 2, "pp": 512, "tg": 64, "pp_tps": 700.0,
        "tg_tps": 10.0, "ttft_s": 0.73, "ms_per_token": 100.0, "rss_peak_gib": 0.9, "foreign_cpu": 0.0,
    }  # fmt: skip
    file = tmp_path / "models.jsonl"
    file.write_text(json.dumps(old) + "\n")
    assert "ratios to" not in report.table("models", tmp_path)
    new = old | {"engine": "cpullm", "tg_tps": 40.0, "turns": 28, "rounds": 4, "ratio_to": "hf-bf16", "pct_bw": 91.3}
    new |= turns.quartiles("tg_ratio", [3.9, 4.0, 4.1]) | turns.quartiles("pp_ratio", [1.0, 2.0, 3.0])
    with file.open("a") as lines:
        lines.write(json.dumps(new) + "\n")
    table = report.table("models", tmp_path)
    ours, theirs = (line.split("|") for line in table.splitlines()[-2:])
    assert [cell.strip() for cell in ours[-5:-1]] == ["2.00 (1.50-2.50)~", "4.00 (3.95-4.05)", "hf-bf16", "91"]
    assert not "".join(theirs[-5:-1]).strip()
    assert "~ the median is not known to within 5 %" in table


# ---- an engine's process --------------------------------------------------------------------------------------------


def test_a_clock_reports_turns_and_does_not_count_the_wait(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr(engines.time, "perf_counter", lambda: now[0])
    sizes = iter([2, 1, 0])

    def reported(times, way):
        told.append((times, way))
        now[0] += 100.0  # other engines' turns
        return next(sizes)

    clock = engines.Clock(reported)
    began = []
    while not clock.done:
        now[0] += 1.0 + len(began)
        began.append(clock.tick("on"))
    assert told == [([1.0], "on"), ([2.0, 3.0], "on"), ([4.0], "on")]
    assert began == [True, False, True, True]


def test_a_clock_alone_collects():
    clock = engines.Clock()
    assert [clock.tick() for _ in range(3)] == [False] * 3
    assert len(clock.times) == 3
    assert not clock.done


class Counter:
    """An engine that counts its tokens, and never generates more than it was asked for."""

    weight_bytes, weights, version, ways = 8, 16, "1", 1

    def __init__(self, args):
        self.tokens = 0

    def run(self, request, clock):
        self.tokens += 1
        clock.tick()
        while not clock.done:
            self.tokens += 1
            clock.tick()


def test_a_process_answers_requests_in_turns_until_its_input_ends(monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "counter", Counter)
    args, said = argparse.Namespace(engine="counter"), []
    lines = [{"pp": 3}, {"go": 2}, {"go": 3}, {"go": 0}, {"pp": 3}, {"go": 4}]
    with pytest.raises(SystemExit, match="0"):
        engines.serve(args, map(json.dumps, lines), said.append)
    loaded, *answers = said
    assert loaded["ways"] == 1
    assert [len(answer["times"]) for answer in answers] == [1, 2, 3, 1, 4]
    assert all(answer["own_cpu_s"] >= 0 and answer["rss_peak_gib"] > 0 for answer in answers)
