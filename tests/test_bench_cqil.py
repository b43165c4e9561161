"""The benchmark of CQIL: its measures on small models, and the rows that it writes."""

import json

import pytest
import torch
from test_cqil import IDS, llama

from benchmarks import bench_cqil, report
from torch_cpullm import cqil


def test_copying():
    class Parrot(torch.nn.Module):
        """Predicts what followed the token before."""

        def forward(self, ids):
            known = torch.nn.functional.one_hot(torch.roll(ids, -1, 1), 100).float()
            return type("Output", (), {"logits": known})

    words = bench_cqil.lists_of(torch.arange(90).repeat(3))
    assert words.shape == (bench_cqil.LISTS, bench_cqil.WORDS)
    assert all(len(set(row.tolist())) == bench_cqil.WORDS for row in words)
    assert bench_cqil.copying(Parrot(), words) == 100
    assert bench_cqil.copying(llama(), words[:2] % 90) < 50


def test_plans():
    model = llama(12)
    names = {}
    for name, plan in bench_cqil.plans_of(model, IDS, 0.25):
        names[name] = plan
        cqil.restore(cqil.apply(model, plan))
    assert len(names) == 8
    assert {plan.reduction for plan in names.values() if plan.mode in ("cqil", "lp", "skip")} == {0.25}
    assert bench_cqil.layers_text(cqil.Plan.of(model, [(1, 2), (3, 2), (7, 1)])) == "1-4, 7"
    assert 0 < bench_cqil.attention_share(model) < 1
    assert [name for name, _ in bench_cqil.plans_of(model, IDS, 0.25, "lp")] == ["pairs, lp", "groups of 4, lp"]
    assert [name for name, _ in bench_cqil.plans_of(model, IDS, 0.25, "even")] == ["layers skipped evenly"]


def test_latency_rows(tmp_path, capsys):
    llama(11, num_key_value_heads=5).save_pretrained(tmp_path / "model")
    rows = tmp_path / "cqil_speed.jsonl"
    common = ["latency", "--model", str(tmp_path / "model"), "--pp", "12", "--tg", "3", "--rounds", "1"]
    bench_cqil.main([*common, "--json", str(rows)])
    bench_cqil.main([*common, "--fold"])
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["plan"] for row in found][:2] == ["none", "2 at once, D = 0"]
    assert [row["grouped layers"] for row in found] == [0, 4, 4, 4, 4, 4, 4]
    assert found[0]["tg, times"] == 1
    assert "folded" in capsys.readouterr().out
    assert "2 at once, lp" in report.table("cqil_speed", tmp_path)


def test_arguments(capsys):
    for argv in ([], ["quality"], ["speed"]):
        with pytest.raises(SystemExit):
            bench_cqil.main(argv)
    capsys.readouterr()
