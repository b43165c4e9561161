"""The table of supported versions: from what pytest reports to the page."""

import json
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import matrix, report  # noqa: E402

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_peft" name="a"/>
<testcase classname="tests.test_peft" name="b"><failure message="no"/></testcase>
<testcase classname="tests.test_peft.TestMore" name="b"><error message="no"/></testcase>
<testcase classname="tests.test_gguf" name="c"><skipped/></testcase>
<testcase classname="" name="tests.test_generation"><error message="collection failure"/></testcase>
</testsuite></testsuites>"""


def test_counts():
    assert matrix.count(JUNIT) == {
        "test_peft": {"passed": 1, "failed": 2, "skipped": 0},
        "test_gguf": {"passed": 0, "failed": 0, "skipped": 1},
        "test_generation": {"passed": 0, "failed": 1, "skipped": 0},
    }


def test_every_file_exists_once():
    names = [name for names in matrix.TOPICS.values() for name in names]
    assert len(set(names)) == len(names)
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in names)


def test_rows_of_a_run(tmp_path, monkeypatch, capsys):
    """A quick file with this interpreter; then one that does not exist."""
    monkeypatch.setattr(matrix, "TOPICS", {"this": ["test_architecture"]})
    out = tmp_path / "support.jsonl"
    assert matrix.main([sys.executable, "--out", str(out)]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["transformers"] == transformers.__version__
    assert row["passed"] > 5
    assert (row["failed"], row["topic"]) == (0, "this")
    assert f"transformers {transformers.__version__}: {row['passed']} tests passed, 0 failed" in capsys.readouterr().out
    monkeypatch.setattr(matrix, "TOPICS", {"this": ["test_of_nothing"]})
    with pytest.raises(RuntimeError, match="no test ran"):
        matrix.main([sys.executable, "--out", str(out)])


def test_table(tmp_path):
    topics = list(matrix.TOPICS)
    known = {"machine": "a machine", "commit": "abc", "torch": "2", "python": "3"}
    rows = [
        {
            **known,
            "date": date,
            "transformers": version,
            "topic": topic,
            "passed": passed,
            "failed": failed,
            "skipped": 0,
        }
        for date, version, topic, passed, failed in (
            ("2026-01-01", "5.10.4", topics[0], 1, 9),
            ("2026-01-02", "5.10.4", topics[0], 10, 0),
            ("2026-01-02", "5.9.1", topics[0], 7, 3),
            ("2026-01-02", "5.9.1", topics[1], 0, 0),
        )
    ]
    (tmp_path / "support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = report.table("support", tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert cells[0] == ["transformers", "5.9.1", "5.10.4"]
    assert cells[1] == [topics[0], "7 of 10 tests", "yes, 10 tests"]
    assert cells[2] == [topics[1], "0 of 0 tests", ""]
    assert len(cells) == 1 + len(topics)
